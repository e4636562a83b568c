"""Products of the CPU's ways by the two libraries that torch has for them: what `kron_hf/ops/gemm.py` rests on.

OMP_WAIT_POLICY=passive python -m examples.benchmarks.libraries --json examples/results/libraries.json

Both run in turn, and medians are compared. Float32; ways of each product as they occur: with W in forward and backward,
with M in the layout `token_last`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_hf.bench.machine import machine
from kron_hf.ops.gemm import onednn_linear

__all__ = ["PRODUCTS", "Operands", "main", "measure"]


class Operands(NamedTuple):
    """`x weight^T`, for x `[rows, inner]` and weight `[columns, inner]`.

    Attributes:
        what: Where it occurs.
        rows: Of x.
        inner: Summed over.
        columns: Of the result.
        transposed: Whether weight lies in memory as `[inner, columns]`.
    """

    what: str
    rows: int
    inner: int
    columns: int
    transposed: bool = False


PRODUCTS = (
    *(Operands("W", 4096, width, width) for width in (192, 384, 768, 1024)),
    Operands("W", 4096, 768, 3072),
    Operands("W", 4096, 3072, 768),
    Operands("W", 197, 768, 768),
    Operands("M, blocks of 8, rank 1", 96, 96, 8 * 512, True),
    Operands("M, blocks of 8, rank 2", 96, 192, 8 * 512, True),
    Operands("M, blocks of 4, rank 1", 192, 192, 4 * 512, True),
)


def measure(product: Operands, repeats: int) -> dict[str, float]:
    """Milliseconds by each library."""
    x, weight = torch.randn(product.rows, product.inner), torch.randn(product.columns, product.inner)
    if product.transposed:
        weight = weight.T.contiguous().T
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": F.linear, "onednn": onednn_linear}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-2, repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(x, weight)
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(own) for name, own in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41, help="runs of each library (default 41)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args(arguments)
    rows = []
    for product in PRODUCTS:
        times = measure(product, options.repeats)
        rows.append({**product._asdict(), **{f"{name}_ms": value for name, value in times.items()}})
        print(
            f"{product.what:24} {product.rows:5} x {product.inner:4} x {product.columns:4}   "
            f"{times['torch']:7.3f} ms, oneDNN {times['onednn']:7.3f} ms: {times['onednn'] / times['torch']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "measured": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
