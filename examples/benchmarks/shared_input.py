"""What layers that read the same input (q, k and v) could share: why each is a product of its own.

OMP_WAIT_POLICY=passive python -m examples.benchmarks.shared_input --json examples/results/shared_input.json

Forward and backward of three layers on a CPU, and the two steps in which they could work together: the product of x
with their block factors, by one matrix product for all, and the sum of their three gradients of x, which autograd
forms. All run in turn, and medians are compared. Float32.
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch

from examples.benchmarks.alternating import medians
from kron_hf.bench.machine import machine
from kron_hf.ops import kron_linear

__all__ = ["LAYERS", "Layers", "main", "measure", "share"]

SETS = 3


class Layers(NamedTuple):
    """Three square layers, and the tokens that all read."""

    tokens: int
    features: int
    block: int
    rank: int


LAYERS = tuple(
    Layers(tokens, features, block, rank)
    for tokens, features in ((1576, 384), (1576, 768), (4096, 768))
    for block, rank in ((16, 1), (16, 2), (32, 2))
)


def measure(layers: Layers, repeats: int) -> dict[str, float]:
    """Milliseconds: of all, of the products with B apart and together, and of adding the gradients of x."""
    tokens, features, block, rank = layers
    blocks = features // block
    x, gradient = torch.randn(tokens, features).requires_grad_(), torch.randn(tokens, features)
    sizes = ((blocks, blocks), (rank, blocks, blocks), (rank, block, block), (features,))
    sets = [[torch.randn(size).requires_grad_() for size in sizes] for _ in range(SETS)]

    def step() -> None:
        outputs = [kron_linear(x, *factors) for factors in sets]
        torch.autograd.backward(outputs, [gradient] * SETS)

    rows = x.detach().view(-1, block)
    factors = [each[2].detach().view(-1, block) for each in sets]
    joined = torch.cat(factors)
    apart = [rows.new_empty(len(rows), len(each)) for each in factors]
    together = rows.new_empty(len(rows), len(joined))
    total = torch.zeros_like(gradient)

    def multiply_apart() -> None:
        for factor, out in zip(factors, apart, strict=True):
            torch.mm(rows, factor.T, out=out)

    def add() -> None:
        for _ in range(SETS - 1):
            total.add_(gradient)

    multiply_together = partial(torch.mm, rows, joined.T, out=together)
    return medians({"step": step, "apart": multiply_apart, "together": multiply_together, "adding": add}, repeats)


def share(times: dict[str, float]) -> float:
    """Of a step, what sharing could save; below 0 it would cost. B's products come twice, forward and backward."""
    return (2 * (times["apart"] - times["together"]) + times["adding"]) / times["step"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="runs of each (default 25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args(arguments)
    rows = []
    for layers in LAYERS:
        times = measure(layers, options.repeats)
        saved = share(times)
        rows.append({**layers._asdict(), **{f"{name}_ms": value for name, value in times.items()}, "share": saved})
        print(
            f"{SETS} x {layers.features} features, {layers.tokens} tokens, blocks of {layers.block}, "
            f"rank {layers.rank}: {times['step']:.1f} ms; products with B {times['apart']:.2f} ms apart, "
            f"{times['together']:.2f} together; sum of gradients {times['adding']:.2f} ms; "
            f"sharing would save {100 * saved:.1f} %"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "measured": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
