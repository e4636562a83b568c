"""Which way of computing a Kronecker-sparse product is cheapest for given shapes.

Costs are in multiply-adds of a large dense product, a token. On CPUs they are fitted to measurements (`cpu_costs`): a
factored product costs its own multiply-adds at a lower rate, and something for each call and for every float of input,
output and what lies between the two products, which stands for the traffic. On other devices, where nothing has been
measured, they are arithmetic (`accelerator_costs`).
`python -m examples.benchmarks.run paths` shows how well the choices hold on a given machine.
"""

from functools import lru_cache
from itertools import product
from math import log2
from typing import NamedTuple

import torch

from kron_hf.ops import accelerator_costs
from kron_hf.ops.cpu_costs import CpuCosts, Rates, cpu_costs
from kron_hf.ops.gemm import onednn_serves
from kron_hf.ops.ways import Factored, Shape, between, multiply_adds

__all__ = [
    "Dropped",
    "backward_cost",
    "backward_path",
    "candidates",
    "dense_cost",
    "factored_paths",
    "forward_cost",
    "forward_path",
    "fused_wins",
    "worth_dropping",
]

_CALLS = {"token_major": (3, 9), "token_last": (4, 9)}  # a chunk, forward and backward
_MARGIN = 0.95  # what the factors must promise before W is not built: they lose more when other work runs beside
_ACCELERATOR_MARGIN = 0.8  # the same, where nothing has been measured
_DROPPING_MARGIN = 0.85  # the same, of living blocks alone
_TOKEN_MAJOR_MIN_BLOCK = 16  # one product a token is slow below: measured up to 5 times the dense product at 8
# Floats that a chunk works on, forward and backward: larger chunks make fewer calls, until what they work on leaves the
# cache. Half as many token-major lower the peak of a single layer's step, and take a tenth to a sixth more time in
# whole models, whose peak stays. Token-last chunks are larger forward, where nothing else is held, than backward, where
# the peak is.
_CHUNK_FLOATS = {"token_major": (2**22, 2**22), "token_last": (2**22, 2**21)}
_MAX_CHUNK = {"token_major": 2048, "token_last": 1024}
# Bytes that are held for a chunk: what stays in an L2 cache, or less than what a dense layer has and a Kronecker layer
# has not, its weight with the gradient and the state of AdamW: four times W.
_ACCELERATOR_CHUNK = 14 * 2**20
_ACCELERATOR_CHUNK_WEIGHTS = 3.5
# Tokens that are left out of a chunk, lest rows of Z and V, tokens last, lie in the same few lines of the cache.
_CHUNK_LESS = {"token_major": 0, "token_last": 16}


class Dropped(NamedTuple):
    """Which dead block rows and columns of S a product leaves out."""

    rows: bool
    columns: bool


@lru_cache(maxsize=4096)
def forward_path(shape: Shape) -> Factored | None:
    """The cheapest way to `x W^T`; None is to build W."""
    path = min(candidates(shape), key=lambda path: forward_cost(shape, path))
    return path if forward_cost(shape, path) < _margin(shape) * forward_cost(shape, None) else None


@lru_cache(maxsize=4096)
def backward_path(shape: Shape) -> Factored | None:
    """The cheapest way to all gradients together; None is `grad^T x`, and the gradient of x by itself."""
    path = min(candidates(shape), key=lambda path: backward_cost(shape, path))
    built = backward_cost(shape, None, forward_path(shape.transposed))
    return path if backward_cost(shape, path) < _margin(shape) * built else None


def dense_cost(shape: Shape) -> float:
    """What `nn.Linear` costs."""
    if shape.device_type != "cpu":
        return accelerator_costs.dense_cost(shape)
    return shape.in_features * shape.out_features + _once(shape, _costs(shape).read)


def forward_cost(shape: Shape, path: Factored | None) -> float:
    """What a way to `x W^T` costs; `nn.Linear` costs `dense_cost`."""
    if shape.device_type != "cpu":
        return accelerator_costs.forward_cost(shape, path)
    if path is None:
        return _weight_cost(shape) + _once(shape, _costs(shape).build, _product(shape, 3))
    products, _ = multiply_adds(shape, path)
    rates, floats = _rates(shape, path), _floats(shape, path)
    calls = _CALLS[path.layout][0] * _chunks(shape, path.chunk)
    return rates.forward * products + rates.forward_float * floats + _once(shape, extra=_product(shape, calls))


def backward_cost(shape: Shape, path: Factored | None, input_path: Factored | None = None) -> float:
    """What a way to all gradients costs; `nn.Linear` costs twice `dense_cost`. See `forward_cost`.

    Where path is None, `input_path` is the way to the gradient of x, a product with W^T.
    """
    if shape.device_type != "cpu":
        return accelerator_costs.backward_cost(shape, path, input_path)
    if path is None:
        reduced = _once(shape, _costs(shape).weight_gradient, _costs(shape).calls(4, shape.threads))
        return dense_cost(shape) + reduced + forward_cost(shape.transposed, input_path)
    _, products = multiply_adds(shape, path)
    rates, floats = _rates(shape, path), _floats(shape, path)
    calls = _CALLS[path.layout][1] * _chunks(shape, path.backward_chunk)
    return rates.backward * products + rates.backward_float * floats + _once(shape, extra=_product(shape, calls))


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
    costs = _costs(shape)

    def cost(dropped: Dropped) -> float:
        smaller = shape._replace(
            out_blocks=living_rows if dropped.rows else shape.out_blocks,
            in_blocks=living_columns if dropped.columns else shape.in_blocks,
        )
        gathered = costs.gather * smaller.in_features if dropped.columns else 0
        scatter = costs.scatter + costs.scatter_run / shape.block_out
        scattered = scatter * smaller.out_features + costs.fill * shape.out_features if dropped.rows else 0
        product = forward_cost(smaller, forward_path(smaller))
        calls = costs.calls(dropped.columns + 3 * dropped.rows, shape.threads)
        return product + gathered + scattered + _once(shape, extra=calls)

    best = min(options, key=cost)
    return best if cost(best) < _DROPPING_MARGIN * cost(nothing) else nothing


def factored_paths(shape: Shape) -> list[Factored]:
    """Every way to compute from the factors, the bad ones too."""
    orders = product(("token_major", "token_last"), ("b_first", "m_first"))
    return [Factored(layout, order, *_chunk_sizes(shape, layout, order)) for layout, order in orders]


def candidates(shape: Shape) -> list[Factored]:
    """Those that are worth a look."""
    paths = factored_paths(shape)
    if shape.device_type != "cpu":  # not measured: large products rather than one a token
        return [path for path in paths if path.layout == "token_last"]
    inner = {"b_first": shape.block_out, "m_first": shape.block_in}
    return [path for path in paths if path.layout == "token_last" or inner[path.order] >= _TOKEN_MAJOR_MIN_BLOCK]


def _margin(shape: Shape) -> float:
    return _MARGIN if shape.device_type == "cpu" else _ACCELERATOR_MARGIN


def _chunk_sizes(shape: Shape, layout: str, order: str) -> tuple[int, int]:
    """Tokens a chunk, forward and backward: on CPUs a power of two, or a little less."""
    if shape.device_type != "cpu":
        held = between(shape, order) + shape.in_features + shape.out_features
        weights = _ACCELERATOR_CHUNK_WEIGHTS * shape.in_features * shape.out_features
        most = max(_ACCELERATOR_CHUNK / shape.dtype.itemsize, weights)
        size = 64 * max(1, int(most / (64 * held)))
        return size, size
    floats = 2 * between(shape, order) + 1.5 * (shape.in_features + shape.out_features)
    forward, backward = (2 ** max(4, round(log2(number / floats))) for number in _CHUNK_FLOATS[layout])
    return _fitting(layout, forward), _fitting(layout, backward)


def _fitting(layout: str, size: int) -> int:
    size = min(_MAX_CHUNK[layout], size)
    return size - _CHUNK_LESS[layout] if size >= 256 else size


def _floats(shape: Shape, path: Factored) -> int:
    """Floats that stand for the traffic, a token: of input, output and what lies between the two products."""
    return shape.in_features + shape.out_features + between(shape, path.order)


def _weight_cost(shape: Shape) -> float:
    """What a product with W costs once W is built."""
    entries = shape.in_features * shape.out_features
    faster = onednn_serves(shape.device_type, shape.dtype, shape.tokens * entries)
    return dense_cost(shape) - (1 - _costs(shape).onednn) * entries if faster else dense_cost(shape)


def _costs(shape: Shape) -> CpuCosts:
    return cpu_costs(shape.dtype, shape.threads)


def _rates(shape: Shape, path: Factored) -> Rates:
    return _costs(shape).token_major if path.layout == "token_major" else _costs(shape).token_last


def _product(shape: Shape, calls: float) -> float:
    """A call of the operator, with those of torch that it makes."""
    return _costs(shape).product(calls, shape.threads)


def _once(shape: Shape, per_entry: float = 0, extra: float = 0) -> float:
    """What is done once for all tokens, with each entry of W and in addition: a token's share of it."""
    return (per_entry * shape.in_features * shape.out_features + extra) / max(1, shape.tokens)


def _chunks(shape: Shape, size: int) -> int:
    return -(-shape.tokens // size)


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
