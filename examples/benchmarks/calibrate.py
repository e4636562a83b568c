"""Measures what `kron_hf/ops/cpu_costs.py` says of this machine, and prints what would stand there.

OMP_WAIT_POLICY=passive python -m examples.benchmarks.calibrate --json examples/results/cpu_costs.json

For each dtype, with one thread and with all of them. Needs a quiet machine: each figure is a median, but other work
changes what threads and memory can do.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported, as `cpu_costs` assumes

import torch
from torch import Tensor

from kron_hf.bench.machine import machine
from kron_hf.ops import cost, kron_linear
from kron_hf.ops.backend import forced, path_name
from kron_hf.ops.cpu_costs import CpuCosts, Rates
from kron_hf.ops.dense_weight import build_weight, factor_gradients
from kron_hf.ops.gemm import linear, onednn_serves
from kron_hf.ops.ways import Shape, multiply_adds

__all__ = ["Measurement", "fit", "main", "measure"]

WIDTHS, BLOCKS, RANKS = (384, 768), (8, 16, 32), (1, 2)
NEEDED = [True, True, True, True, True]


@dataclass(frozen=True)
class Measurement:
    """How long it is measured, and at which size.

    Attributes:
        tokens: Of the products.
        repeats: Runs of each.
        widths: In and out features of the square layers.
    """

    tokens: int = 4096
    repeats: int = 9
    widths: tuple[int, ...] = WIDTHS


def measure(dtype: torch.dtype, how: Measurement) -> CpuCosts:
    """All costs of a dtype with the present number of threads, in multiply-adds of a large dense product."""
    width, threads = how.widths[-1], torch.get_num_threads()
    x, weight = torch.randn(how.tokens, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    unit = _seconds(lambda: torch.nn.functional.linear(x, weight), how.repeats) / (how.tokens * width * width)
    short = 20 * how.repeats
    small, factors = torch.randn(8, 8, dtype=dtype), _factors(64, 8, 1, dtype)
    one = _one_thread(lambda: _seconds(lambda: small @ small, short))
    larger = torch.randn(64, 64, dtype=dtype)  # the smallest that MKL gives several threads everywhere
    alone = _one_thread(lambda: _seconds(lambda: larger @ larger, short))
    wake = max(0.0, _seconds(lambda: larger @ larger, short) - alone) if threads > 1 else 0.0
    row = torch.randn(1, 64, dtype=dtype)
    with forced("token-major-b-first"):
        operator = _one_thread(lambda: _seconds(lambda: kron_linear(row, *factors), short)) - 3 * one
    entries, (_, *m_and_b) = width * width, _factors(width, 16, 2, dtype)
    build = _seconds(lambda: build_weight(*m_and_b), short) / entries
    reduce = _seconds(lambda: factor_gradients(weight, *m_and_b), short) / entries
    with_w = _seconds(lambda: linear(x, weight, None), how.repeats) / (how.tokens * entries)
    read = _seconds(lambda: torch.nn.functional.linear(x[:1], weight), short) / entries
    nothing = Rates(0, 0, 0, 0)
    calls = CpuCosts(nothing, nothing, operator=max(0.0, operator) / unit, call=one / unit, wake=wake / unit)
    return calls._replace(
        token_major=_rates("token_major", calls, unit, dtype, how),
        token_last=_rates("token_last", calls, unit, dtype, how),
        build=build / unit,
        weight_gradient=reduce / unit,
        onednn=with_w / unit if onednn_serves("cpu", dtype, how.tokens * entries) else 1.0,
        read=max(0.0, read / unit - 1),
        **_moving(x, unit, how.repeats),
    )


def _rates(layout: str, calls: CpuCosts, unit: float, dtype: torch.dtype, how: Measurement) -> Rates:
    """Least squares over the shapes of what a product costs beyond its calls."""
    threads, rows = torch.get_num_threads(), []
    for width, block, rank in product(how.widths, BLOCKS, RANKS):
        s, a, b = _factors(width, block, rank, dtype)
        shape = Shape.of(how.tokens, a, b)
        path = next(each for each in cost.factored_paths(shape) if (each.layout, each.order) == (layout, "b_first"))
        x, g = (torch.randn(how.tokens, width, dtype=dtype) for _ in range(2))
        with forced(path_name(path)):
            forward = _seconds(lambda x=x, s=s, a=a, b=b: kron_linear(x, s, a, b), how.repeats)
            backward = _seconds(
                lambda g=g, x=x, s=s, a=a, b=b: torch.ops.kron_hf.kron_linear_backward(g, x, s, a, b, NEEDED),
                how.repeats,
            )
        products = multiply_adds(shape, path)
        chunks = (-(-how.tokens // size) for size in (path.chunk, path.backward_chunk))
        made = [
            calls.product(each * number, threads) / how.tokens
            for each, number in zip(cost._CALLS[layout], chunks, strict=True)
        ]
        floats = cost._floats(shape, path)
        rows.append((products[0], floats, forward / unit / how.tokens - made[0]))
        rows.append((products[1], floats, backward / unit / how.tokens - made[1]))
    return Rates(*fit(rows[::2]), *fit(rows[1::2]))


def fit(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """`(p, q)` for which `p * first + q * second` is next to the third of each row, relatively; not below 0."""
    table = torch.tensor(rows, dtype=torch.float64)
    table = table[table[:, 2] > 0]
    if not len(table):
        return 0.0, 0.0
    scaled = table[:, :2] / table[:, 2:]
    p, q = torch.linalg.lstsq(scaled, torch.ones(len(table), 1, dtype=torch.float64)).solution.flatten().tolist()
    if p < 0 or q < 0:  # one of them alone
        column = scaled[:, 0 if q < 0 else 1]
        alone = (column.sum() / column.square().sum()).item()
        return (alone, 0.0) if q < 0 else (0.0, alone)
    return p, q


def _moving(x: Tensor, unit: float, repeats: int) -> dict[str, float]:
    """To gather half of the block columns, to fill an output, to scatter half of the block rows into it."""
    tokens, width = x.shape
    rows, bias = [], torch.randn(width, dtype=x.dtype)
    gather = fill = 0.0
    for block in (4, 8, 16, 32):
        blocks = width // block
        half = torch.arange(0, blocks, 2)
        split, living = x.view(tokens, blocks, block), torch.randn(tokens, len(half), block, dtype=x.dtype)
        filled = bias.view(blocks, block).repeat(tokens, 1, 1)
        moved = unit * living.numel()
        scatter = _seconds(lambda f=filled, h=half, y=living: f.index_copy_(1, h, y), repeats) / moved
        rows.append((1.0, 1 / block, scatter))
        gather = max(gather, _seconds(lambda s=split, h=half: s.index_select(1, h), repeats) / moved)
        fill = max(
            fill, _seconds(lambda n=blocks, b=block: bias.view(n, b).repeat(tokens, 1, 1), repeats) / (unit * x.numel())
        )
    scatter, run = fit(rows)
    return {"gather": gather, "fill": fill, "scatter": scatter, "scatter_run": run}


def _factors(width: int, block: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    blocks = width // block
    sizes = ((blocks, blocks), (rank, blocks, blocks), (rank, block, block))
    s, a, b = (torch.randn(size).to(dtype) for size in sizes)
    return s, a, b


def _seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        run()
        if repeat > 1:
            times.append(time.perf_counter() - start)
    return median(times)


def _one_thread(run: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def line(costs: CpuCosts) -> str:
    """As it would stand in `cpu_costs`."""
    rates = [f"Rates({', '.join(f'{value:.3g}' for value in rate)})" for rate in costs[:2]]
    others = [f"{name}={value:.3g}" for name, value in costs._asdict().items() if not isinstance(value, Rates)]
    return f"CpuCosts({', '.join([*rates, *others])})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (default: one and torch's)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args(arguments)
    threads = options.threads or sorted({1, torch.get_num_threads()})
    about, found = machine(), []
    print(", ".join(f"{name}: {value}" for name, value in about.items() if name != "threads"), flush=True)
    for name, number in product(options.dtype, threads):
        torch.set_num_threads(number)
        costs = measure(getattr(torch, name), Measurement(options.tokens, options.repeats))
        found.append({"dtype": name, "threads": number, "costs": costs._asdict()})
        print(f"{name}, {number} threads: {line(costs)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "measured": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
