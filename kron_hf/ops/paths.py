"""The kernels of `kron_linear`: in plain PyTorch, for every device, and the door to the fused ones."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kron_hf.ops import fused
from kron_hf.ops.autocast import autocast_enabled
from kron_hf.ops.backend import backward_path, forward_path, fused_first
from kron_hf.ops.dense_weight import build_weight, factor_gradients
from kron_hf.ops.gemm import linear
from kron_hf.ops.layouts import Layout, TokenLast, TokenMajor
from kron_hf.ops.ways import Factored, Shape

__all__ = ["backward", "forward"]

_LAYOUTS: dict[str, type[Layout]] = {"token_major": TokenMajor, "token_last": TokenLast}


def forward(x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias`, see `operator.kron_linear`."""
    out = _product(_rows(x), a if s is None else s * a, b, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def backward(
    grad_output: Tensor, x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients for x, s, a, b and bias; an empty tensor for each that is not needed."""
    if autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return backward(grad_output, x, s, a, b, needed)
    need_x, need_s, need_a, need_b, need_bias = needed
    g, m = _rows(grad_output), a if s is None else s * a
    grad_x = grad_m = grad_b = None
    if need_s or need_a or need_b:
        rows = _rows(x)
        grad_x, grad_m, grad_b = _gradients(g, rows, m, b, need_x)
    if need_x and grad_x is None:
        grad_x = _product(g, m.transpose(1, 2), b.transpose(1, 2), None)
    grads = (
        grad_x.view(x.shape) if need_x and grad_x is not None else None,
        (grad_m * a).sum(0).to(a.dtype) if need_s and grad_m is not None else None,
        (grad_m if s is None else grad_m * s).to(a.dtype) if need_a and grad_m is not None else None,
        grad_b.to(b.dtype) if need_b and grad_b is not None else None,
        g.sum(0) if need_bias else None,
    )
    # Contiguous as the fake kernel promises; an own empty tensor each, for outputs of an operator must not alias.
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _rows(x: Tensor) -> Tensor:
    """One token a row, contiguous."""
    return x.contiguous() if x.dim() == 2 else x.reshape(-1, x.shape[-1]).contiguous()


def _product(rows: Tensor, m: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`rows W^T + bias` with `W = sum_i m_i (x) b_i`."""
    shape = Shape.of(len(rows), m, b)
    fused_out = fused.product(shape, rows, m, b, bias) if fused_first(shape) else None
    if fused_out is not None:
        return fused_out
    path = forward_path(shape)
    if path is None:
        return linear(rows, build_weight(m, b), bias)
    layout = _layout(path, m, b)
    out = rows.new_empty(rows.shape[0], m.shape[1] * b.shape[1])
    for x, y in _chunks(path.chunk, rows, out):
        if path.order == "b_first":
            layout.contract(layout.expand(x), bias, y)
        else:
            layout.finish(layout.pull(layout.prepare(x)), bias, y)
    return out


def _chunks(size: int, rows: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in chunks of that many tokens."""
    if len(rows) <= size:
        yield rows, out  # slices cost more than one would think, and few tokens have nothing to hide that behind
        return
    for start in range(0, len(rows), size):
        yield rows[start : start + size], out[start : start + size]


def _gradients(g: Tensor, rows: Tensor, m: Tensor, b: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients for x (None if not needed, or not found on the way), M and B."""
    shape = Shape.of(len(rows), m, b)
    fused_grads = fused.gradients(shape, g, rows, m, b, need_x) if fused_first(shape) else None
    if fused_grads is not None:
        return fused_grads
    path = backward_path(shape)
    if path is None:
        return None, *factor_gradients(g.T @ rows, m, b)  # one large product, cheap where the rank is high
    return _factored_gradients(path, g, rows, m, b, need_x)


def _layout(path: Factored, m: Tensor, b: Tensor) -> Layout:
    """The layout of the factors, for the order "m_first" of the transposed factors."""
    if path.order == "m_first":
        m, b = m.transpose(1, 2), b.transpose(1, 2)
    return _LAYOUTS[path.layout](m, b)


def _factored_gradients(
    path: Factored, g: Tensor, rows: Tensor, m: Tensor, b: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients for x (None if not needed), M and B, a chunk of tokens at a time."""
    layout, m_first = _layout(path, m, b), path.order == "m_first"
    accumulate = torch.promote_types(g.dtype, torch.float32)
    grad_m, grad_b = layout.zero_grad_m(accumulate), layout.zero_grad_b(accumulate)
    grad_x = torch.empty_like(rows) if need_x else None
    for start in range(0, rows.shape[0], path.backward_chunk):
        chunk = slice(start, start + path.backward_chunk)
        left, right = (rows[chunk], g[chunk]) if m_first else (g[chunk], rows[chunk])
        left = layout.prepare(left)
        z = layout.expand(right)
        layout.grad_m(left, z, grad_m)
        if grad_x is not None and m_first:
            layout.contract(z, None, grad_x[chunk])
        v = layout.pull(left)
        layout.grad_b(v, right, grad_b)
        if grad_x is not None and not m_first:
            layout.finish(v, None, grad_x[chunk])
    m_total, b_total = layout.unpack_m(grad_m), layout.unpack_b(grad_b)
    return (grad_x, m_total.transpose(1, 2), b_total.transpose(1, 2)) if m_first else (grad_x, m_total, b_total)
