"""Products of the CPU's ways by the two libraries that torch has for them: what `kron_hf/ops/gemm.py` rests on.

OMP_WAIT_POLICY=passive python -m examples.benchmarks.libraries --json examples/results/libraries.json

Both run in turn, and medians are compared. Float32; W is that of a layer and its input 4,096 tokens, or 197.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch
import torch.nn.functional as F

from examples.benchmarks.alternating import medians
from kron_hf.bench.machine import machine
from kron_hf.ops.gemm import onednn_linear

__all__ = ["PRODUCTS", "Operands", "main", "measure"]


class Operands(NamedTuple):
    """`x W^T`, for x `[tokens, in_features]` and W `[out_features, in_features]`."""

    tokens: int
    in_features: int
    out_features: int


PRODUCTS = (
    *(Operands(4096, width, width) for width in (192, 384, 768, 1024)),
    *(Operands(4096, *features) for features in ((768, 3072), (3072, 768))),
    *(Operands(197, width, width) for width in (192, 384, 768, 1024)),
)


def measure(product: Operands, repeats: int) -> dict[str, float]:
    """Milliseconds by each library."""
    x, weight = (torch.randn(size, product.in_features) for size in (product.tokens, product.out_features))
    return medians({"torch": lambda: F.linear(x, weight), "onednn": lambda: onednn_linear(x, weight)}, repeats)


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
            f"{product.tokens:5} tokens, {product.in_features:4} to {product.out_features:4} features: "
            f"{times['torch']:7.3f} ms, oneDNN {times['onednn']:7.3f} ms, {times['onednn'] / times['torch']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "measured": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
