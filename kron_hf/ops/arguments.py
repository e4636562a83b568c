"""What `kron_linear` takes, and the errors for everything else."""

import torch
from torch import Tensor

__all__ = ["check_arguments"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Raises unless shapes, dtypes and devices fit together.

    Raises:
        ValueError: Shapes that do not fit together, or different devices.
        TypeError: Different dtypes, or one that is not floating point of 16 to 64 bits.
    """
    dtype, device = x.dtype, x.device
    if dtype not in _DTYPES:
        raise _mixture(x, s, a, b, bias)
    for tensor in (s, a, b, bias):
        # A tensor on meta would give values nobody computed.
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            raise _mixture(x, s, a, b, bias)
    blocks = a.shape[1:] if s is None else s.shape
    if len(blocks) != 2 or a.dim() != 3 or b.dim() != 3 or a.shape[1:] != blocks or a.shape[0] != b.shape[0]:
        raise ValueError(
            "kron_linear: required are s [O, I], a [rank, O, I], b [rank, bo, bi], "
            f"got s {None if s is None else list(s.shape)}, a {list(a.shape)}, b {list(b.shape)}"
        )
    out_features, in_features = blocks[0] * b.shape[1], blocks[1] * b.shape[2]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"kron_linear: x must have {in_features} features (I * bi = {blocks[1]} * {b.shape[2]}) in its last "
            f"dimension, got shape {list(x.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"kron_linear: bias must have shape [{out_features}] (O * bo = {blocks[0]} * {b.shape[1]}), "
            f"got {list(bias.shape)}"
        )


def _mixture(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Exception:
    """The error for dtypes or devices that do not fit."""
    named = {"x": x, "s": s, "a": a, "b": b, "bias": bias}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    if x.dtype not in _DTYPES or any(tensor.dtype != x.dtype for tensor in given.values()):
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        return TypeError(
            f"kron_linear: all tensors must have the same floating point dtype of 16 to 64 bits, got {dtypes}"
        )
    devices = ", ".join(f"{name} {tensor.device}" for name, tensor in given.items())
    return ValueError(f"kron_linear: x, s, a, b and bias must be on one device, got {devices}")
