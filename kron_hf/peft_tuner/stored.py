"""Kronecker layers that wait for the tensors of a stored adapter.

Memory is taken for tensors that a file holds, never for sizes that its config claims. Private and touched here alone:
torch's `_parameters`.
"""

# What stands for two classes of layers is typed as their common one.
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.checkpoint import mark_trained
from kron_hf.conv_layer import KronConv2d
from kron_hf.kron_layer import KronLayer
from kron_hf.layers import KronLinear
from kron_hf.targets import Target

__all__ = ["StoredKronConv2d", "StoredKronLinear", "stored_layer"]


class _Stored(KronLayer):
    """On the meta device until its tensors arrive."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in list(self.named_parameters()):
            stored = state_dict.get(prefix + name)
            if parameter.is_meta and stored is not None and stored.shape == parameter.shape:
                memory = torch.empty_like(parameter, device=self.weight.device)
                setattr(self, name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        mark_trained(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader sets parameters one by one, without load_state_dict, which freezes the mask elsewhere.
        arrives = name == "s" and isinstance(value, Tensor) and not value.is_meta and "s" in self._parameters
        arrives = arrives and self.s.is_meta
        super().__setattr__(name, value)
        if arrives:
            self.freeze_mask()


class StoredKronLinear(_Stored, KronLinear):
    """A `KronLinear` on the meta device that waits for the tensors of a stored adapter."""


class StoredKronConv2d(_Stored, KronConv2d):
    """A `KronConv2d` on the meta device that waits for the tensors of a stored adapter."""


def stored_layer(target: Target) -> KronLayer:
    """The layer for a module, with its sizes, dtype and mode."""
    dense = target.module
    kind = StoredKronLinear if isinstance(dense, nn.Linear) else StoredKronConv2d
    layer = kind.like(dense, target.block_size, target.rank, device="meta")
    layer.register_buffer("weight", torch.empty(0, device=dense.weight.device, dtype=dense.weight.dtype))
    mark_trained(layer)
    return layer
