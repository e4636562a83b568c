"""Which way of computing a Kronecker-sparse product is cheapest for given shapes."""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

__all__ = ["Factored", "Shape", "backward_path", "forward_path"]


class Shape(NamedTuple):
    """All that decides the way: so it is the same in every process, whatever the values are."""

    device_type: str
    dtype: torch.dtype
    tokens: int
    out_blocks: int
    in_blocks: int
    block_out: int
    block_in: int
    rank: int

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
        chunk: Tokens in a chunk.
    """

    layout: Literal["token_major", "token_last"]
    order: Literal["b_first", "m_first"]
    chunk: int


@lru_cache(maxsize=4096)
def forward_path(shape: Shape) -> Factored | None:
    """The cheapest way to `x W^T`; None is to build W."""
    path = _best_factored(shape)
    return path if _forward_cost(shape, path) < shape.out_features * shape.in_features else None


@lru_cache(maxsize=4096)
def backward_path(shape: Shape) -> Factored | None:
    """The cheapest way to all gradients together; None is `grad^T x`, and the gradient of x by itself."""
    path = _best_factored(shape)
    dense = shape.out_features * shape.in_features
    apart = dense + min(dense, _forward_cost(shape.transposed, _best_factored(shape.transposed)))
    return path if _backward_cost(shape, path) < apart else None


def _best_factored(shape: Shape) -> Factored:
    b_first, m_first = _products(shape)
    order, inner = ("b_first", shape.block_out) if sum(b_first) <= sum(m_first) else ("m_first", shape.block_in)
    layout = "token_major" if inner >= 16 else "token_last"
    return Factored(layout, order, _chunk(shape))


def _products(shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Multiply-adds a token of the products with (B_i, M_i), for each order."""
    _, _, _, out_blocks, in_blocks, block_out, block_in, rank = shape
    b_first = (rank * shape.in_features * block_out, rank * in_blocks * shape.out_features)
    m_first = (rank * shape.out_features * block_in, rank * out_blocks * shape.in_features)
    return b_first, m_first


def _forward_cost(shape: Shape, path: Factored) -> float:
    slope, per_float = (1.35, 23) if path.layout == "token_major" else (1.15, 100)
    macs = sum(_products(shape)[path.order == "m_first"])
    return slope * macs + per_float * (shape.out_features + shape.in_features)


def _backward_cost(shape: Shape, path: Factored) -> float:
    with_b, with_m = _products(shape)[path.order == "m_first"]
    return 1.6 * (3 * with_b + 2 * with_m) + 100 * (shape.out_features + shape.in_features)


def _chunk(shape: Shape) -> int:
    floats = 2**17  # what stays in the second-level cache of one core
    return min(2048, max(64, 1 << (floats // max(shape.out_features, shape.in_features)).bit_length() - 1))
