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

__all__ = [
    "Dropped",
    "Factored",
    "Shape",
    "backward_cost",
    "backward_path",
    "factored_paths",
    "forward_cost",
    "forward_path",
    "fused_wins",
    "worth_dropping",
]


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
_GATHER_COST = 25  # a float of the input, to gather it with other living blocks
_FILL_COST = 9  # a float of the output, to fill it before what lives is written into it
_CALL_COST = 15e6  # to wake the other threads for one call of torch: 0.15 ms, where OpenMP threads sleep in between
_CALLS = {"token_major": (3, 9), "token_last": (4, 9)}  # a chunk, forward and backward
_MARGIN = 0.85  # what the factors must promise before W is not built: they lose more when other work runs beside
_TOKEN_MAJOR_MIN_BLOCK = 16  # one product a token is slow below: measured up to 5 times the dense product at 8
# Floats that a chunk works on: larger chunks make fewer calls, until what they work on leaves the cache.
_CHUNK_FLOATS = {"token_major": 2**22, "token_last": 2**21}
_MAX_CHUNK = 2048


class Dropped(NamedTuple):
    """Which dead block rows and columns of S a product leaves out."""

    rows: bool
    columns: bool


@lru_cache(maxsize=4096)
def forward_path(shape: Shape) -> Factored | None:
    """The cheapest way to `x W^T`; None is to build W."""
    path = min(_candidates(shape), key=lambda path: forward_cost(shape, path))
    if shape.device_type != "cpu":
        return path if forward_cost(shape, path) <= _dense_cost(shape) / 4 else None
    return path if forward_cost(shape, path) < _MARGIN * forward_cost(shape, None) else None


@lru_cache(maxsize=4096)
def backward_path(shape: Shape) -> Factored | None:
    """The cheapest way to all gradients together; None is `grad^T x`, and the gradient of x by itself."""
    path = min(_candidates(shape), key=lambda path: backward_cost(shape, path))
    if shape.device_type != "cpu":
        return path if sum(_multiply_adds(shape, path)) <= _dense_cost(shape) / 4 else None
    built = backward_cost(shape, None, forward_path(shape.transposed))
    return path if backward_cost(shape, path) < built else None


def forward_cost(shape: Shape, path: Factored | None) -> float:
    """What a way to `x W^T` costs; `nn.Linear` costs `in * out`. On other devices than CPUs multiply-adds alone."""
    if path is None:
        return _dense_cost(shape, _BUILD_COST, calls=3)
    products = sum(_multiply_adds(shape, path))
    if shape.device_type != "cpu":
        return products
    rates, floats = _rates(shape, path), shape.in_features + shape.out_features
    return rates.forward * products + rates.forward_float * floats + _call_cost(shape, path, _CALLS[path.layout][0])


def backward_cost(shape: Shape, path: Factored | None, input_path: Factored | None = None) -> float:
    """What a way to all gradients costs; `nn.Linear` costs `2 * in * out`. See `forward_cost`.

    Where path is None, `input_path` is the way to the gradient of x, a product with W^T.
    """
    if path is None:
        return _dense_cost(shape, _WEIGHT_GRADIENT_COST, calls=4) + forward_cost(shape.transposed, input_path)
    with_b, with_m = _multiply_adds(shape, path)
    products = 3 * with_b + 2 * with_m
    if shape.device_type != "cpu":
        return products
    rates, floats = _rates(shape, path), shape.in_features + shape.out_features
    return rates.backward * products + rates.backward_float * floats + _call_cost(shape, path, _CALLS[path.layout][1])


def worth_dropping(shape: Shape, living_rows: int, living_columns: int) -> Dropped:
    """Whether the product is cheaper without the block rows and columns of S that are all zero.

    Inputs without the dead columns are gathered and outputs scattered between the dead rows, which costs traffic.
    """
    nothing = Dropped(rows=False, columns=False)
    if shape.device_type != "cpu" or not living_rows:  # elsewhere the traffic has not been measured
        return nothing
    options = [
        Dropped(rows, columns)
        for rows in {False, living_rows < shape.out_blocks}
        for columns in {False, living_columns < shape.in_blocks}
    ]

    def cost(dropped: Dropped) -> float:
        smaller = shape._replace(
            out_blocks=living_rows if dropped.rows else shape.out_blocks,
            in_blocks=living_columns if dropped.columns else shape.in_blocks,
        )
        gathered = _GATHER_COST * smaller.in_features if dropped.columns else 0
        scattered = _scatter_cost(shape.block_out) * smaller.out_features + _FILL_COST * shape.out_features
        calls = (dropped.columns + 3 * dropped.rows) * _CALL_COST / max(1, shape.tokens)
        product = forward_cost(smaller, forward_path(smaller))
        return product + gathered + (scattered if dropped.rows else 0) + calls

    best = min(options, key=cost)
    return best if cost(best) < _MARGIN * cost(nothing) else nothing


def _scatter_cost(block_out: int) -> float:
    return 25 + 280 / block_out  # short runs are slow to write


def factored_paths(shape: Shape) -> list[Factored]:
    """Every way to compute from the factors, the bad ones too."""
    orders = product(("token_major", "token_last"), ("b_first", "m_first"))
    return [Factored(layout, order, _chunk(shape, layout, order)) for layout, order in orders]


def _candidates(shape: Shape) -> list[Factored]:
    if shape.device_type != "cpu":  # not measured: large products rather than one a token
        return [path for path in factored_paths(shape) if path.layout == "token_last"]
    inner = {"b_first": shape.block_out, "m_first": shape.block_in}
    return [
        path
        for path in factored_paths(shape)
        if path.layout == "token_last" or inner[path.order] >= _TOKEN_MAJOR_MIN_BLOCK
    ]


def _chunk(shape: Shape, layout: str, order: str) -> int:
    """Tokens a chunk, a power of two."""
    if shape.device_type != "cpu":  # few launches
        return 8192
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


def _rates(shape: Shape, path: Factored) -> _Rates:
    return _CPU_RATES_BY_DTYPE.get(shape.dtype, _CPU_RATES)[path.layout]


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
