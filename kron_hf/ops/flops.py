"""Tells `torch.utils.flop_counter` what the operator costs; without it profilers would count nothing."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import kron_hf.ops.operator  # noqa: F401  # registers the operators
from kron_hf.factors import kron_flops

__all__ = ["backward_flops", "forward_flops"]


@register_flop_formula(torch.ops.kron_hf.kron_linear)
def forward_flops(
    x: Sequence[int], s: Sequence[int] | None, a: Sequence[int], b: Sequence[int], *_: Any, **__: Any
) -> int:
    """FLOPs of the cheaper factored order for all tokens; the arguments are shapes."""
    out_features, in_features = a[1] * b[1], a[2] * b[2]
    return prod(x[:-1]) * kron_flops(out_features, in_features, (b[1], b[2]), a[0])


@register_flop_formula(torch.ops.kron_hf.kron_linear_backward)
def backward_flops(
    grad_output: Sequence[int],
    x: Sequence[int],
    s: Sequence[int] | None,
    a: Sequence[int],
    b: Sequence[int],
    needed: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of both operands of each product: once the forward for x, once for the factors."""
    return (needed[0] + any(needed[1:4])) * forward_flops(x, s, a, b)
