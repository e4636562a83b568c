"""The shape of a product, and the ways to compute it from its factors."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Factored", "Shape", "between", "multiply_adds", "tf32_allowed"]


class Shape(NamedTuple):
    """All that decides the way: so it is the same in every process with as many threads, whatever the values are.

    `threads` are those of a CPU; `tf32` says that a GPU may compute float32 products in it.
    """

    device_type: str
    dtype: torch.dtype
    tokens: int
    out_blocks: int
    in_blocks: int
    block_out: int
    block_in: int
    rank: int
    threads: int = 1
    tf32: bool = False

    @classmethod
    def of(cls, tokens: int, m: Tensor, b: Tensor) -> "Shape":
        """That of a product of so many tokens with factors m `[rank, O, I]` and b `[rank, bo, bi]`."""
        (rank, out_blocks, in_blocks), (_, block_out, block_in) = m.shape, b.shape
        kind = b.device.type
        threads = torch.get_num_threads() if kind == "cpu" else 1
        tf32 = kind == "cuda" and tf32_allowed(b.dtype)
        return cls(kind, b.dtype, tokens, out_blocks, in_blocks, block_out, block_in, rank, threads, tf32)

    @property
    def out_features(self) -> int:
        """`O * bo`."""
        return self.out_blocks * self.block_out

    @property
    def in_features(self) -> int:
        """`I * bi`."""
        return self.in_blocks * self.block_in

    @property
    def transposed(self) -> "Shape":
        """The shape of the layer with weight `W^T`, which turns the gradient of y into that of x."""
        return self._replace(
            out_blocks=self.in_blocks, in_blocks=self.out_blocks, block_out=self.block_in, block_in=self.block_out
        )


class Factored(NamedTuple):
    """Compute from the factors, a chunk of tokens at a time.

    Attributes:
        layout: How Z lies in memory, see `layouts`.
        order: Whether the block factors B_i or M_i = S * A_i come first.
        chunk: Tokens in a chunk, forward.
        backward_chunk: The same, backward.
    """

    layout: Literal["token_major", "token_last"]
    order: Literal["b_first", "m_first"]
    chunk: int
    backward_chunk: int


def between(shape: Shape, order: str) -> int:
    """Floats between the two products, a token."""
    return shape.rank * (shape.in_blocks * shape.block_out if order == "b_first" else shape.out_blocks * shape.block_in)


def multiply_adds(shape: Shape, path: Factored) -> tuple[int, int]:
    """Of the forward and of the backward, a token: backward computes the first product again."""
    if path.order == "b_first":
        first, second = shape.in_features * shape.block_out, shape.in_blocks * shape.out_features
    else:
        first, second = shape.out_blocks * shape.in_features, shape.out_features * shape.block_in
    return shape.rank * (first + second), shape.rank * (3 * first + 2 * second)


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether torch's own products of that dtype may use TF32 on a GPU."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
