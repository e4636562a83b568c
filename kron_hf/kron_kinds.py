"""Which Kronecker layer stands for which dense one."""

from typing import Any

from torch import nn

from kron_hf.conv_layer import KronConv2d, refuse_groups
from kron_hf.kron_layer import KronLayer
from kron_hf.layers import KronLinear

__all__ = ["dense_sizes", "kron_kind"]

KINDS: dict[type[nn.Module], type[KronLayer]] = {nn.Linear: KronLinear, nn.Conv2d: KronConv2d}


def kron_kind(dense: nn.Module, name: str) -> type[KronLayer]:
    """The class of the Kronecker layer for a dense one.

    Raises:
        ValueError: There is none for a layer of this class, of a subclass, or of several groups; names the module.
    """
    kind = KINDS.get(type(dense))
    if kind is None:
        raise ValueError(
            f"{name}: only nn.Linear and nn.Conv2d can become a Kronecker layer, this is a {type(dense).__name__}"
        )
    if isinstance(dense, nn.Conv2d):
        refuse_groups(dense.groups, (dense.out_channels, dense.in_channels), name)
    return kind


def dense_sizes(dense: nn.Linear | nn.Conv2d) -> tuple[int, int, int, int]:
    """`(out, in, kernel entries, input positions)` of a dense layer, as `kron_flops` takes them."""
    if isinstance(dense, nn.Linear):
        return dense.out_features, dense.in_features, 1, 1
    kernel: Any = dense.kernel_size
    stride: Any = dense.stride
    return dense.out_channels, dense.in_channels, kernel[0] * kernel[1], stride[0] * stride[1]
