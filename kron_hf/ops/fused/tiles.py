"""Tile sizes of the kernels, from the shape of the layer, its dtype and whether float32 may be TF32.

They keep the float32 tiles of a program in its registers: tests compile them for the targets and look for spills.
"""

from typing import NamedTuple

import torch

from kron_hf.ops.ways import Shape, tf32_allowed

__all__ = ["Tiles", "grad_m_tiles", "precision", "product_tiles", "transposed_product_tiles"]

_MMA_K = 16  # the least K of a product on tensor cores


class Tiles(NamedTuple):
    """What a program owns or takes a step; see `kernels`."""

    tokens: int
    out: int
    in_: int
    rank: int
    pad_out: int
    pad_in: int
    spread: int
    warps: int
    stages: int


class _Limits(NamedTuple):
    """Entries of a float32 tile, its columns (token, entry of a block), ranks, blocks a step; warps and stages."""

    entries: int
    columns: int
    rank: int
    step: int
    warps: int
    stages: int


# By precision: true float32 knows no tensor cores, and keeps its operands in registers besides.
_PRODUCT = {
    "half": _Limits(8192, 128, 4, 64, 4, 3),
    "tf32": _Limits(4096, 64, 2, 16, 8, 2),
    "float32": _Limits(1024, 32, 2, 16, 4, 2),
}
_TRANSPOSED = {
    "half": _Limits(8192, 128, 4, 64, 8, 2),
    "tf32": _Limits(4096, 64, 2, 16, 8, 2),
    "float32": _Limits(2048, 32, 2, 16, 8, 2),
}
_GRAD_M = {
    "half": _Limits(8192, 128, 4, 64, 8, 2),
    "tf32": _Limits(4096, 64, 2, 32, 8, 2),
    "float32": _Limits(4096, 64, 2, 32, 8, 2),
}


def product_tiles(shape: Shape) -> Tiles:
    """Tiles of `product_kernel`."""
    limits = _PRODUCT[precision(shape.dtype)]
    pad_out, pad_in = _power_of_two(shape.block_out), _power_of_two(shape.block_in)
    rank = _rank(limits, shape, pad_out * pad_in)
    tokens = _tokens(limits, pad_out, pad_in)
    out = _blocks(shape.out_blocks, limits.entries // (tokens * max(rank * pad_in, pad_out)))
    spread = max(1, _MMA_K // (rank * pad_in))
    return Tiles(
        tokens, out, _step(shape.in_blocks, limits.step), rank, pad_out, pad_in, spread, limits.warps, limits.stages
    )


def transposed_product_tiles(shape: Shape) -> Tiles:
    """Tiles of `transposed_product_kernel`."""
    limits = _TRANSPOSED[precision(shape.dtype)]
    pad_out, pad_in = _power_of_two(shape.block_out), _power_of_two(shape.block_in)
    rank = _rank(limits, shape, pad_out * pad_in)
    spread = max(1, _MMA_K // (rank * pad_out))
    tokens = _tokens(limits, pad_out, pad_in)
    in_ = _blocks(shape.in_blocks, limits.entries // (tokens * max(rank * pad_out * spread, pad_in)))
    in_ = max(in_, _MMA_K // tokens)  # K of dB is in_ * tokens
    warps = limits.warps if rank * pad_out > 8 else 4  # more registers a thread: with 8 warps ptxas spills some
    return Tiles(tokens, _step(shape.out_blocks, limits.step), in_, rank, pad_out, pad_in, spread, warps, limits.stages)


def grad_m_tiles(shape: Shape) -> Tiles:
    """Tiles of `grad_m_kernel`, which pads bo to 16 rather than to spread it."""
    limits = _GRAD_M[precision(shape.dtype)]
    pad_out, pad_in = max(_MMA_K, _power_of_two(shape.block_out)), _power_of_two(shape.block_in)
    rank = _rank(limits, shape, pad_out * pad_in)
    tokens = max(_MMA_K // pad_in, _tokens(limits, pad_out, pad_in))  # K of dM is tokens * pad_in
    out = _blocks(shape.out_blocks, limits.entries // (tokens * max(rank * pad_in, pad_out)))
    in_ = _blocks(shape.in_blocks, min(limits.entries // (tokens * pad_in), limits.step))
    return Tiles(tokens, out, in_, rank, pad_out, pad_in, 1, limits.warps, limits.stages)


def precision(dtype: torch.dtype) -> str:
    """The row of limits for products of a dtype, as torch's settings are."""
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if tf32_allowed(dtype) else "float32"


def _rank(limits: _Limits, shape: Shape, entries: int) -> int:
    """Ranks a program, for that many entries a rank in the operand that holds B."""
    return max(1, min(_power_of_two(shape.rank), limits.rank, limits.entries // entries))


def _tokens(limits: _Limits, pad_out: int, pad_in: int) -> int:
    """Tokens whose entries of one block, taken from the input and from the output, fill the columns."""
    return max(1, limits.columns // _power_of_two((pad_out + pad_in) // 2))


def _blocks(blocks: int, most: int) -> int:
    """Rows or columns of blocks a program: no more than there are."""
    return max(1, min(_power_of_two(blocks), most))


def _step(blocks: int, most: int) -> int:
    """Blocks a step along K: the largest that leaves little of the last step empty."""
    for step in (64, 32):
        if step <= most and -(-blocks // step) * step <= blocks * 9 // 8:
            return step
    return _MMA_K


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
