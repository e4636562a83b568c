"""Which way of computing a Kronecker-sparse product is cheapest for given shapes.

Costs are in multiply-adds of a large dense product, a token. On CPUs they are fitted to measurements on one core of an
AVX-512 machine (torch 2.13, MKL): a factored product costs its own multiply-adds at a lower rate, and something for
every float of input and output, which stands for the traffic, and for each call.
`examples/benchmarks/kron_linear_cpu.py` shows how well the choices hold on a given machine.
"""

from functools import lru_cache
from itertools import product
from math import log2
from typing import Literal, NamedTuple

import torch

__all__ = ["Factored", "Shape", "backward_path", "forward_path", "fused_wins"]


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


class _Rates(NamedTuple):
    """Cost of a multiply-add and of a float of input or output, forward and backward."""

    forward: float
    forward_float: float
    backward: float
    backward_float: float


_CPU_RATES = {
    "token_major": _Rates(1.25, 15, 1.45, 30),
    "token_last": _Rates(1.1, 46, 1.4, 80),
}
_CPU_RATES_BY_DTYPE = {
    # The dense product is twice as fast here, moving data is not.
    torch.bfloat16: {"token_major": _Rates(1.2, 54, 1.5, 200), "token_last": _Rates(1.0, 154, 1.7, 250)},
    # Small products have no fast kernel; the dense backward has none either, so that factors win there anyway.
    torch.float16: {"token_major": _Rates(5, 20, 1.45, 40), "token_last": _Rates(22, 46, 1.4, 95)},
}
_BUILD_COST = 30  # an entry of W: to build it
_WEIGHT_GRADIENT_COST = 80  # an entry of W: to reduce its gradient to those of M_i and B_i
_CALL_COST = 15e6  # to wake the other threads for one call of torch: 0.15 ms, where OpenMP threads sleep in between
_CALLS = {"token_major": (3, 9), "token_last": (4, 9)}  # a chunk, forward and backward
_MARGIN = 0.85  # what the factors must promise before W is not built: they lose more when other work runs beside
_TOKEN_MAJOR_MIN_BLOCK = 16  # one product a token is slow below: measured up to 5 times the dense product at 8
# Floats that a chunk works on: larger chunks make fewer calls, until what they work on leaves the cache.
_CHUNK_FLOATS = {"token_major": 2**22, "token_last": 2**21}
_MAX_CHUNK = 2048


@lru_cache(maxsize=4096)
def forward_path(shape: Shape) -> Factored | None:
    """The cheapest way to `x W^T`; None is to build W."""
    path = min(_candidates(shape), key=lambda path: _forward_cost(shape, path))
    if shape.device_type != "cpu":
        return path if sum(_multiply_adds(shape, path)) <= _dense_cost(shape) / 4 else None
    return path if _forward_cost(shape, path) < _MARGIN * _dense_cost(shape, _BUILD_COST, calls=3) else None


@lru_cache(maxsize=4096)
def backward_path(shape: Shape) -> Factored | None:
    """The cheapest way to all gradients together; None is `grad^T x`, and the gradient of x by itself."""
    path = min(_candidates(shape), key=lambda path: _backward_cost(shape, path))
    if shape.device_type != "cpu":
        return path if sum(_multiply_adds(shape, path)) <= _dense_cost(shape) / 4 else None
    weight_gradient = _dense_cost(shape, _WEIGHT_GRADIENT_COST, calls=4)
    input_path = forward_path(shape.transposed)
    if input_path is None:
        grad_input = _dense_cost(shape, _BUILD_COST, calls=3)
    else:
        grad_input = _forward_cost(shape.transposed, input_path)
    return path if _backward_cost(shape, path) < weight_gradient + grad_input else None


def _candidates(shape: Shape) -> list[Factored]:
    if shape.device_type != "cpu":
        # Not measured: large products rather than one a token, few launches, and only where the FLOPs leave room.
        return [Factored("token_last", order, 8192) for order in ("b_first", "m_first")]
    paths = []
    for layout, order in product(("token_major", "token_last"), ("b_first", "m_first")):
        inner = shape.block_out if order == "b_first" else shape.block_in
        if layout == "token_last" or inner >= _TOKEN_MAJOR_MIN_BLOCK:
            paths.append(Factored(layout, order, _chunk(shape, layout, order)))
    return paths


def _chunk(shape: Shape, layout: str, order: str) -> int:
    """Tokens a chunk, a power of two."""
    between = shape.in_blocks * shape.block_out if order == "b_first" else shape.out_blocks * shape.block_in
    floats = 2 * shape.rank * between + 1.5 * (shape.in_features + shape.out_features)
    return min(_MAX_CHUNK, 2 ** max(4, round(log2(_CHUNK_FLOATS[layout] / floats))))


def _multiply_adds(shape: Shape, path: Factored) -> tuple[int, int]:
    """Of the products with B_i and with M_i in the forward, a token."""
    if path.order == "b_first":
        with_b, with_m = shape.in_features * shape.block_out, shape.in_blocks * shape.out_features
    else:
        with_b, with_m = shape.out_features * shape.block_in, shape.out_blocks * shape.in_features
    return shape.rank * with_b, shape.rank * with_m


def _dense_cost(shape: Shape, once_per_entry: int = 0, calls: int = 0) -> float:
    """One product with a dense weight, and what is done once for each of its entries."""
    tokens = max(1, shape.tokens)
    return shape.in_features * shape.out_features * (1 + once_per_entry / tokens) + calls * _CALL_COST / tokens


def _forward_cost(shape: Shape, path: Factored) -> float:
    rates = _CPU_RATES_BY_DTYPE.get(shape.dtype, _CPU_RATES)[path.layout]
    products, floats = sum(_multiply_adds(shape, path)), shape.in_features + shape.out_features
    return rates.forward * products + rates.forward_float * floats + _call_cost(shape, path, _CALLS[path.layout][0])


def _backward_cost(shape: Shape, path: Factored) -> float:
    rates = _CPU_RATES_BY_DTYPE.get(shape.dtype, _CPU_RATES)[path.layout]
    with_b, with_m = _multiply_adds(shape, path)
    products, floats = 3 * with_b + 2 * with_m, shape.in_features + shape.out_features
    return rates.backward * products + rates.backward_float * floats + _call_cost(shape, path, _CALLS[path.layout][1])


def _call_cost(shape: Shape, path: Factored, calls: int) -> float:
    """Of that many calls a chunk, a token."""
    chunks = -(-shape.tokens // path.chunk)
    return calls * _CALL_COST * chunks / max(1, shape.tokens)


def fused_wins(shape: Shape) -> bool:
    """Whether the Triton kernels of `fused` are to be tried first.

    Arithmetic, not measured: on devices of the H200's class the product must be large, and bound by memory rather than
    by multiply-adds, as it is not in float32.
    """
    smaller, larger = sorted((shape.block_out, shape.block_in))
    return (
        shape.device_type == "cuda"
        and shape.dtype in (torch.bfloat16, torch.float16)
        and shape.tokens >= 8192
        and 2 * shape.in_features * shape.out_features >= 768 * (shape.in_features + shape.out_features)
        and smaller >= 16
        and larger <= 32
        and shape.rank <= smaller // 4
    )
