"""Runs the kernels: allocates outputs, lays the grid, adds up partial sums. Imports triton; `fused` is the door."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kron_hf.ops.fused.kernels import grad_m_kernel, product_kernel, transposed_product_kernel
from kron_hf.ops.fused.tiles import Tiles, grad_m_tiles, product_tiles, transposed_product_tiles
from kron_hf.ops.ways import Shape, tf32_allowed

__all__ = ["Launch", "gradients", "gradients_launches", "product", "product_launch"]

# Programs that share the sums over tokens: some for each multiprocessor of a large device. Not asked of the device,
# so that the order of summation, and with it every bit, is the same on all.
_PROGRAMS = 528


class Launch(NamedTuple):
    """A kernel and all that it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Puts the kernel on the current stream."""
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


def product(x: Tensor, m: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` for x `[N, I * bi]`, contiguous, with `W = sum_i m_i (x) b_i`; N may not be 0."""
    y = x.new_empty(x.shape[0], m.shape[1] * b.shape[1])
    with _device(x):
        product_launch(x, m, b, bias, y).run()
    return y


def gradients(g: Tensor, x: Tensor, m: Tensor, b: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients for x (None if not needed), M and B, the last two in float32, from g `[N, O * bo]`, contiguous."""
    grad_x = torch.empty_like(x) if need_x else None
    with _device(x):
        launches, partial_m, partial_b = gradients_launches(g, x, m, b, grad_x)
        for launch in launches:
            launch.run()
        return grad_x, partial_m.sum(0), partial_b.sum(0)


def product_launch(x: Tensor, m: Tensor, b: Tensor, bias: Tensor | None, y: Tensor) -> Launch:
    """The launch that writes y."""
    shape = Shape.of(len(x), m, b)
    tiles = product_tiles(shape)
    tensors = {"u_ptr": x, "m_ptr": m, "b_ptr": b, "bias_ptr": y if bias is None else bias.contiguous(), "v_ptr": y}
    sizes = {"tokens": len(x), "out_blocks": shape.out_blocks, "in_blocks": shape.in_blocks}
    arguments = tensors | sizes | _m_strides(m) | _b_strides(b) | {"HAS_BIAS": bias is not None, "SPREAD": tiles.spread}
    grid = (_tiles(len(x), tiles.tokens) * _tiles(shape.out_blocks, tiles.out),)
    return _launch(product_kernel, grid, arguments, shape, tiles)


def gradients_launches(
    g: Tensor, x: Tensor, m: Tensor, b: Tensor, grad_x: Tensor | None
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that write grad_x and the partial sums of dM and dB, and the partial sums."""
    shape = Shape.of(len(x), m, b)
    m_launch, partial_m = _grad_m_launch(g, x, b, shape)
    b_launch, partial_b = _transposed_launch(g, x, m, b, shape, grad_x)
    launches = [m_launch, b_launch]
    if grad_x is not None and not b_launch.arguments["WRITE_GRAD_X"]:
        launches.append(product_launch(g, m.transpose(1, 2), b.transpose(1, 2), None, grad_x))
    return launches, partial_m, partial_b


def _transposed_launch(
    g: Tensor, x: Tensor, m: Tensor, b: Tensor, shape: Shape, grad_x: Tensor | None
) -> tuple[Launch, Tensor]:
    tiles = transposed_product_tiles(shape)
    in_tiles, rank_tiles = _tiles(shape.in_blocks, tiles.in_), _tiles(shape.rank, tiles.rank)
    programs, tiles_a_program = _ranges(_tiles(len(x), tiles.tokens), in_tiles * rank_tiles)
    partial = x.new_empty(programs * in_tiles, *b.shape, dtype=torch.float32)
    tensors = {"g_ptr": g, "m_ptr": m, "b_ptr": b, "x_ptr": x, "grad_x_ptr": x if grad_x is None else grad_x}
    arguments = (
        {**tensors, "partial_ptr": partial, "tokens": len(x), "tiles_a_program": tiles_a_program}
        | {"out_blocks": shape.out_blocks, "in_blocks": shape.in_blocks}
        | _m_strides(m)
        | _b_strides(b)
        | {"WRITE_GRAD_X": grad_x is not None and rank_tiles == 1, "SPREAD": tiles.spread}
    )
    grid = (programs * in_tiles, rank_tiles)
    return _launch(transposed_product_kernel, grid, arguments, shape, tiles), partial


def _grad_m_launch(g: Tensor, x: Tensor, b: Tensor, shape: Shape) -> tuple[Launch, Tensor]:
    tiles = grad_m_tiles(shape)
    block_tiles = _tiles(shape.out_blocks, tiles.out) * _tiles(shape.in_blocks, tiles.in_)
    rank_tiles = _tiles(shape.rank, tiles.rank)
    programs, tiles_a_program = _ranges(_tiles(len(x), tiles.tokens), block_tiles * rank_tiles)
    partial = x.new_empty(programs, shape.rank, shape.out_blocks, shape.in_blocks, dtype=torch.float32)
    tensors = {"g_ptr": g, "b_ptr": b, "x_ptr": x, "partial_ptr": partial}
    sizes = {"tokens": len(x), "tiles_a_program": tiles_a_program}
    sizes |= {"out_blocks": shape.out_blocks, "in_blocks": shape.in_blocks}
    grid = (block_tiles, rank_tiles, programs)
    return _launch(grad_m_kernel, grid, tensors | sizes | _b_strides(b), shape, tiles), partial


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], shape: Shape, tiles: Tiles) -> Launch:
    constants = {
        "RANK": shape.rank,
        "BLOCK_OUT": shape.block_out,
        "BLOCK_IN": shape.block_in,
        "PAD_OUT": tiles.pad_out,
        "PAD_IN": tiles.pad_in,
        "TILE_TOKENS": tiles.tokens,
        "TILE_OUT": tiles.out,
        "TILE_IN": tiles.in_,
        "TILE_RANK": tiles.rank,
        "PRECISION": "tf32" if tf32_allowed(shape.dtype) else "ieee",
    }
    return Launch(kernel, grid, arguments | constants, tiles.warps, tiles.stages)


def _ranges(token_tiles: int, others: int) -> tuple[int, int]:
    """Into how many ranges the token tiles are split beside that many other programs, and tiles a range."""
    each = _tiles(token_tiles, max(1, _PROGRAMS // others))
    return _tiles(token_tiles, each), each


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _m_strides(m: Tensor) -> dict[str, int]:
    return dict(zip(("m_rank_stride", "m_out_stride", "m_in_stride"), m.stride(), strict=True))


def _b_strides(b: Tensor) -> dict[str, int]:
    return dict(zip(("b_rank_stride", "b_out_stride", "b_in_stride"), b.stride(), strict=True))


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
