"""What zeros of S save: the same share of zero blocks as single blocks, and as whole rows and columns of blocks.

OMP_WAIT_POLICY=passive python -m examples.benchmarks.sparsity_speed --json examples/results/sparsity_speed.json

A network with two Kronecker layers of 768 features (blocks of 16, rank 2) learns scikit-learn's digits while
`Sparsifier` makes 80 % of its blocks zero. Then the two layers and the GELU between them run on 4,096 tokens without
gradients: as trained, after `fold_for_inference`, and as dense layers, in turn. Accuracy is that on 360 digits held
out.
"""

import argparse
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.benchmarks.alternating import medians
from kron_hf import KronLinear, Sparsifier, fold_for_inference, kron_param_groups
from kron_hf.bench.machine import machine
from kron_hf.sparsity import empty_columns, empty_rows

__all__ = ["SETTINGS", "Setting", "main", "measure"]

FEATURES, BLOCK, RANK, TARGET = 768, 16, 2, 0.8
HELD_OUT, BATCH = 360, 128


class Setting(NamedTuple):
    """How much whole rows and columns count against single blocks, and which of the two."""

    group_penalty: float
    groups: str


SETTINGS = (
    Setting(0.0, "both"),
    Setting(0.5, "both"),
    *(Setting(1.0, groups) for groups in ("both", "rows", "columns")),
)


def measure(setting: Setting, *, seed: int, steps: int, tokens: int, repeats: int) -> dict[str, float]:
    """Trains, then gives accuracy, shares of zeros, and milliseconds."""
    torch.manual_seed(seed)
    images, labels = _digits()
    network = nn.Sequential(
        *(nn.Linear(64, FEATURES), nn.GELU()),
        nn.Sequential(_layer(), nn.GELU(), _layer()),
        *(nn.GELU(), nn.Linear(FEATURES, 10)),
    )
    sparsity = _train(network, images[HELD_OUT:], labels[HELD_OUT:], setting, steps)
    network.eval()
    with torch.no_grad():
        right = (network(images[:HELD_OUT]).argmax(1) == labels[:HELD_OUT]).float().mean().item()
    layers = [module for module in network.modules() if isinstance(module, KronLinear)]
    found = {"accuracy": right, "sparsity": sparsity, "rows": empty_rows(layers), "columns": empty_columns(layers)}
    return found | _times(network[2], torch.randn(tokens, FEATURES), repeats)


def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def _layer() -> KronLinear:
    return KronLinear(FEATURES, FEATURES, BLOCK, RANK)


def _train(network: nn.Module, images: Tensor, labels: Tensor, setting: Setting, steps: int) -> float:
    optimizer = torch.optim.AdamW(kron_param_groups(network, 1e-3))
    sparsifier = Sparsifier(network, target_sparsity=TARGET, total_steps=steps, **setting._asdict())
    sparsifier.attach(optimizer)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    sparsifier.close()
    return sparsifier.sparsity


def _times(part: nn.Module, x: Tensor, repeats: int) -> dict[str, float]:
    folded: Any = fold_for_inference(copy.deepcopy(part))
    dense = nn.Sequential(*(each.to_linear() if isinstance(each, KronLinear) else each for each in part.children()))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), dense(x), rtol=1e-3, atol=1e-3)
        ways = {"trained": lambda: part(x), "folded": lambda: folded(x), "dense": lambda: dense(x)}
        return {f"{name}_ms": ms for name, ms in medians(ways, repeats).items()}


HEADER = "penalty  groups   zeros  rows  columns  accuracy  trained  folded   (time of a forward over dense)"


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    shares = f"{row['sparsity']:5.2f}  {row['rows']:4.2f}  {row['columns']:7.2f}  {row['accuracy']:8.3f}"
    trained, folded = (row[f"{way}_ms"] / row["dense_ms"] for way in ("trained", "folded"))
    return f"{row['group_penalty']:7.1f}  {row['groups']:<7}  {shares}  {trained:7.2f}  {folded:6.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each setting (default 3)")
    parser.add_argument("--steps", type=int, default=400, help="steps of a training (default 400)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a timed call (default 4096)")
    parser.add_argument("--repeats", type=int, default=25, help="runs of each (default 25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args(arguments)
    how = {"steps": options.steps, "tokens": options.tokens, "repeats": options.repeats}
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for setting in SETTINGS:
        runs = [measure(setting, seed=seed, **how) for seed in range(options.seeds)]
        row = {name: mean(run[name] for run in runs) for name in runs[0]}
        rows.append({**setting._asdict(), **row})
        print(describe(rows[-1]))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "seeds": options.seeds, **how, "measured": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
