"""Convolutions with a Kronecker-sparse weight: the way that takes the least time, and autograd around it."""

from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from kron_hf.ops.autocast import autocast_enabled
from kron_hf.ops.autograd_state import transformed
from kron_hf.ops.convolution_ways import BFirst, BuildW, Factors, MFirst, Product
from kron_hf.ops.geometry import Convolution, Pair

__all__ = ["Way", "cheapest_way", "kron_conv2d", "multiply_adds", "way_costs"]

Way = Literal["b_first", "m_first", "build_w"]
_WAYS: dict[Way, type[Product]] = {"b_first": BFirst, "m_first": MFirst, "build_w": BuildW}
# What a float between the two steps costs, in multiply-adds of a dense convolution, for each side of the kernel: it is
# written and read, forward and backward, and convolutions of blocks with few channels run at a lower rate. Measured on
# a CPU (`python -m examples.benchmarks.run convolutions`).
_BETWEEN = 70


def cheapest_way(m_shape: torch.Size, b_shape: torch.Size, input_positions: int, device_type: str) -> Way:
    """The way that promises to take the least time per position of the output; of two alike m_first, which is faster.

    Neither the batch nor the size of the images decides, so that a program exported for any of them is the same.
    Building W once a call, which is as much as `rank` positions more, is not counted. On the meta device, where nothing
    is computed and FLOPs are counted, it is the one of the two ways from the factors with fewer multiply-adds.
    """
    if device_type == "meta":
        counts = multiply_adds(m_shape, b_shape, input_positions)
        return "m_first" if counts["m_first"] <= counts["b_first"] else "b_first"
    costs = way_costs(m_shape, b_shape, input_positions)
    return min(costs, key=lambda way: costs[way])


def way_costs(m_shape: torch.Size, b_shape: torch.Size, input_positions: int) -> dict[Way, float]:
    """What each way costs per position of the output, in multiply-adds of a dense convolution."""
    (rank, out_blocks, in_blocks), (_, block_out, block_in, *kernel) = m_shape, b_shape
    a_float = _BETWEEN * prod(kernel) ** 0.5
    between = {"m_first": rank * input_positions * out_blocks * block_in, "b_first": rank * in_blocks * block_out}
    counts = multiply_adds(m_shape, b_shape, input_positions)
    return {way: count + a_float * between.get(way, 0) for way, count in counts.items()}


def multiply_adds(m_shape: torch.Size, b_shape: torch.Size, input_positions: int) -> dict[Way, int]:
    """Of each way, per position of the output; to build W is not counted."""
    (rank, out_blocks, in_blocks), (_, block_out, block_in, *kernel) = m_shape, b_shape
    out_channels, in_channels, kernel_entries = out_blocks * block_out, in_blocks * block_in, prod(kernel)
    return {
        "m_first": rank * (input_positions * in_channels * out_blocks + kernel_entries * out_channels * block_in),
        "b_first": rank * (kernel_entries * in_channels * block_out + out_channels * in_blocks),
        "build_w": kernel_entries * in_channels * out_channels,
    }


def kron_conv2d(
    x: Tensor, m: Tensor, b: Tensor, bias: Tensor | None, convolution: Convolution, way: Way | None = None
) -> Tensor:
    """The convolution of x with `W = sum_i m_i (x) b_i`, plus the bias.

    As a dense convolution, it keeps its input alone for backward. Under autocast all arguments are cast.

    Args:
        x: `[N, I * bi, H, W]`.
        m: `S * A_i`, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi, kh, kw]`.
        bias: `[O * bo]` or None.
        convolution: Its geometry.
        way: How to compute it; None is the cheapest way. All give the same up to rounding.

    Returns:
        `[N, O * bo, H', W']`.
    """
    if autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, m, b, bias = x.to(dtype), m.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype)
    x, padding = convolution.padded(x)
    way = way or cheapest_way(m.shape, b.shape, convolution.input_positions, x.device.type)
    compiling = torch.compiler.is_compiling()  # compilers choose themselves what to keep
    if torch.is_grad_enabled() and not compiling and not transformed():
        y: Tensor = _KronConv2d.apply(x, m, b, convolution, padding, way)  # type: ignore[assignment]
    else:
        y = _WAYS[way](Factors(m, b), convolution, padding).forward(x)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


class _KronConv2d(torch.autograd.Function):
    """Saves the input and the factors only. Backward is made of operators that autograd differentiates again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, b: Tensor, convolution: Convolution, padding: Pair, way: Way) -> Tensor:
        ctx.save_for_backward(x, m, b)
        ctx.how = convolution, padding, way
        return _WAYS[way](Factors(m, b), convolution, padding).forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, m, b = ctx.saved_tensors
        convolution, padding, way = ctx.how
        product = _WAYS[way](Factors(m, b), convolution, padding)
        return *product.backward(grad_outputs[0], x, ctx.needs_input_grad[0]), None, None, None
