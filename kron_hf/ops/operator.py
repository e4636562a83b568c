"""Registration of `kron_hf::kron_linear` with the dispatcher, and the function that calls it.

The schema comes first, then one kernel for all devices (`paths`), the shapes of the outputs for tracing, autograd, and
autocast.
Autograd is an own `autograd.Function` under the Autograd key: `torch.library.register_autograd` costs 10 us more a
call and `torch.library.custom_op` 15 us more, which small models pay thousands of times.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from kron_hf.factors import kron_sum, to_blocks
from kron_hf.ops import paths
from kron_hf.ops.arguments import check_arguments
from kron_hf.ops.autograd_state import below_autograd, transformed

__all__ = ["kron_linear"]

_library = Library("kron_hf", "DEF")
_library.define("kron_linear(Tensor x, Tensor? s, Tensor a, Tensor b, Tensor? bias) -> Tensor")
_library.define(
    "kron_linear_backward(Tensor grad_output, Tensor x, Tensor? s, Tensor a, Tensor b, bool[5] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("kron_linear_backward", paths.backward, "CompositeExplicitAutograd")
_forward_op = torch.ops.kron_hf.kron_linear.default
_backward_op = torch.ops.kron_hf.kron_linear_backward.default


def _forward(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    check_arguments(x, s, a, b, bias)
    return paths.forward(x, s, a, b, bias)


_library.impl("kron_linear", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("kron_hf::kron_linear", lib=_library)
def _forward_fake(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    check_arguments(x, s, a, b, bias)
    return x.new_empty((*x.shape[:-1], a.shape[1] * b.shape[1]))


@torch.library.register_fake("kron_hf::kron_linear_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor, x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    shapes = (x.shape, a.shape[1:], a.shape, b.shape, grad_output.shape[-1:])
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, needed, strict=True))


class _KronLinearFunction(torch.autograd.Function):
    """Saves the input and the parameters only: S * A_i and the products with B_i are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        # As dense layers do, without the input where no factor is trained.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, s, a, b)
        with below_autograd():
            return _forward_op(x, s, a, b, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), needed = grad_outputs, ctx.needs_input_grad
        x, s, a, b = ctx.saved_tensors  # outside the guard: it may run a checkpointed forward, under autograd
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(grad, x, s, a, b, needed)
        with below_autograd():
            if x is None:  # only its shape is asked for
                x = grad.new_empty(1).expand(*grad.shape[:-1], a.shape[2] * b.shape[2])
            grads = _backward_op(grad, x, s, a, b, needed)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))


def _differentiable_backward(
    grad: Tensor, x: Tensor | None, s: Tensor | None, a: Tensor, b: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients by formulas that autograd differentiates again; W's is there for the moment."""
    need_x, need_s, need_a, need_b, need_bias = needed
    m, g = a if s is None else s * a, grad.reshape(-1, grad.shape[-1])
    grad_m = grad_b = None
    if x is not None:
        blocks = to_blocks(g.T @ x.reshape(-1, x.shape[-1]), (b.shape[1], b.shape[2]))
        grad_m, grad_b = (b.flatten(1) @ blocks.T).view(m.shape), (m.flatten(1) @ blocks).view(b.shape)
    return (
        _forward_op(grad, None, m.transpose(1, 2), b.transpose(1, 2), None) if need_x else None,
        (grad_m * a).sum(0) if need_s and grad_m is not None else None,
        (grad_m if s is None else grad_m * s) if need_a and grad_m is not None else None,
        grad_b if need_b else None,
        g.sum(0) if need_bias else None,
    )


def _autograd(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if transformed():
        check_arguments(x, s, a, b, bias)
        return F.linear(x, kron_sum(a if s is None else s * a, b), bias)
    if torch.is_grad_enabled():
        return _KronLinearFunction.apply(x, s, a, b, bias)
    with below_autograd():
        return _forward_op(x, s, a, b, bias)


_library.impl("kron_linear", _autograd, "Autograd")


def _autocast(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Casts as torch casts the arguments of `F.linear`: floating point ones, but for float64."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type)
    given = (x, s, a, b, bias)
    cast = [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in given]
    with torch.autocast(device_type, enabled=False):
        return _forward_op(*cast)


for _device in ("CPU", "CUDA", "XPU", "MPS", "HPU", "MTIA", "XLA", "PrivateUse1"):
    _library.impl("kron_linear", _autocast, f"Autocast{_device}")


def kron_linear(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x W^T + bias` with `W = sum_i (s * a_i) (x) b_i` (paper, eq. 2), without keeping W.

    Under autocast all floating point arguments are cast, as those of `F.linear` are. Reductions over tokens are
    accumulated in float32 at least. Same inputs give the same bits.

    Args:
        x: `[..., I * bi]`, any strides, any number of leading dimensions.
        s: Mask factor S, `[O, I]`; None if A holds it already.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi]`.
        bias: `[O * bo]` or None.

    Returns:
        `[..., O * bo]`.

    Raises:
        ValueError: Shapes that do not fit together, or different devices.
        TypeError: Different dtypes, or one that is not floating point of 16 to 64 bits.
    """
    return _forward_op(x, s, a, b, bias)
