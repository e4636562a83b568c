"""Experiment: is the block size that one training chooses the right one?

planted   A 64 x 64 teacher of rank 1 with blocks of 4, 8 or 16, about half of them zero, with and without noise in the
          targets: does the selection find its block size?
fashion   Fashion-MNIST, an MLP 784-256-128-10 on 20,000 images: does it choose what training each candidate alone
          would, with and without a cost of parameters, and how long does it take?

Writes one JSON line a run, skips the runs that the file already holds, and prints tables.

python examples/experiments/block_size.py --output examples/results/block_size.jsonl
"""

import argparse
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from kron_hf import KronConfig, get_kron_model, kron_param_groups
from kron_hf.data.grey import load_grey_set
from kron_hf.selection import BlockSizeSelector

BLOCKS = [4, 8, 16]
SEEDS = {"planted": range(5), "fashion": range(3)}
STEPS = {"planted": 800, "fashion": 500}
RATES = {"planted": 0.01, "fashion": 0.001}
NOISY_SEEDS = (3, 4)  # of the planted teachers: their targets carry noise of half the signal's deviation
COST_WEIGHT = 0.3  # validation loss that the parameters of dense layers are worth, where each is trained alone
# What a candidate's removal costs a model that has been trained with it is many times what training without it would
# have cost, so the same preference is a larger weight there.
REMOVAL_COST_WEIGHT = 5.0
SELECTIONS: dict[str, dict[str, Any]] = {
    "validation": {"mode": "validation"},
    "penalty": {"mode": "penalty"},
    "penalty, by size": {"mode": "penalty", "penalty_weights": "size"},
    "validation, restart": {"mode": "validation", "restart": True},
    "validation, cost": {"mode": "validation", "cost": "params", "cost_weight": REMOVAL_COST_WEIGHT},
}
PLANTED_MODES = ("validation", "penalty", "penalty, by size")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=["planted", "fashion"], help="planted, fashion")
    parser.add_argument("--output", type=Path, default=Path("examples/results/block_size.jsonl"))
    parser.add_argument("--picture", type=Path, help="where to draw the norms of the first Fashion-MNIST selection")
    parser.add_argument("--dataset", default="fashion_mnist", help="digits, fashion_mnist or a folder with IDX files")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of every training; default {STEPS}")
    parser.add_argument("--learning-rate", type=float, help=f"base rate of every training; default {RATES}")
    return parser.parse_args()


def train(
    model: nn.Module,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    rate: float,
    steps: int,
    select: dict[str, Any] | None = None,
    until_chosen: bool = False,
) -> BlockSizeSelector | None:
    """Trains with AdamW, warm-up and cosine; `select` are the arguments of a selection."""
    optimizer = torch.optim.AdamW(kron_param_groups(model, rate))
    warm_up = max(1, steps // 20)
    schedule = LambdaLR(
        optimizer, lambda step: min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    selector = None
    if select is not None:
        selector = BlockSizeSelector(model, total_steps=steps, **select)
        selector.attach(optimizer, schedule)
    model.train()
    for step in range(steps):
        if until_chosen and selector is not None and selector.done:
            break
        x, y = batches(step)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    if selector is not None:
        selector.close()
    return selector


def chosen_block(selector: BlockSizeSelector) -> int:
    """The one block size that all layers have in the end."""
    (size,) = {tuple(entry["block_size"]) for entry in selector.result.modules.values()}
    return size[0]


def planted(mode: str, block: int, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """One selection on a planted teacher; it ends when one candidate is left."""
    noise = 0.5 if seed in NOISY_SEEDS else 0.0
    torch.manual_seed(100 * block + seed)
    blocks = 64 // block
    alive = (torch.rand(blocks, blocks) < 0.5).float()
    teacher = torch.kron(alive * torch.randn(blocks, blocks), torch.randn(block, block))
    teacher *= 8 / teacher.norm()
    x = torch.randn(2048 + 512, 64)
    y = x @ teacher.T
    y += noise * y.std() * torch.randn_like(y)
    student = nn.Sequential(nn.Linear(64, 64, bias=False))
    model = get_kron_model(student, KronConfig(candidate_block_sizes=BLOCKS, rank=1, target_modules="all-linear"))

    def batches(_: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, 2048, (64,))
        return x[rows], y[rows]

    def held_out() -> float:
        return float(F.mse_loss(model(x[2048:]), y[2048:]))

    began = time.perf_counter()
    select = {**SELECTIONS[mode], "evaluate": held_out}
    selector = train(model, batches, F.mse_loss, rate, steps, select, until_chosen=True)
    assert selector is not None
    found = {"chosen": chosen_block(selector), "left": selector.candidates_left}
    return {"true": block, "noise": noise, **found, "seconds": round(time.perf_counter() - began, 2)}


class FashionMlp:
    """The data on tensors, and the models and trainings on it."""

    def __init__(self, source: str, steps: int, rate: float) -> None:
        data = load_grey_set(source)
        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (images, labels) in parts.items():
            pixels = torch.tensor(images[:20_000], dtype=torch.float32).flatten(1) / 255
            self.rows[name] = (pixels - 0.286) / 0.353, torch.tensor(labels[:20_000], dtype=torch.int64)
        self.steps, self.rate = steps, rate

    def run(self, blocks: list[int], select: dict[str, Any] | None, seed: int) -> tuple[Any, dict[str, Any]]:
        """Trains with these blocks, as candidates if there is a choice."""
        torch.manual_seed(seed)
        layers = [nn.Linear(self.rows["train"][0].shape[1], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
        sizes: dict[str, Any] = {"candidate_block_sizes": blocks} if select else {"block_size": blocks[0]}
        config = KronConfig(**sizes, rank=2, target_modules=["0", "2"])
        model = get_kron_model(nn.Sequential(*layers, nn.Linear(128, 10)), config)
        x, y = self.rows["train"]

        def batches(_: int) -> tuple[Tensor, Tensor]:
            rows = torch.randint(0, len(x), (128,))
            return x[rows], y[rows]

        def held_out() -> float:
            return self.evaluate(model, "validation", 2000)[0]

        began = time.process_time()  # the machine may have other work
        arguments = None if select is None else {**select, "evaluate": held_out}
        selector = train(model, batches, F.cross_entropy, self.rate, self.steps, arguments)
        seconds = time.process_time() - began
        model.eval()
        loss, accuracy = self.evaluate(model, "validation")
        return selector, {
            "validation_loss": round(loss, 4),
            "validation_accuracy": round(accuracy, 4),
            "test_accuracy": round(self.evaluate(model, "test")[1], 4),
            "params_of_dense": round(
                sum(p.numel() for name, p in model.named_parameters() if name.rpartition(".")[2] in ("s", "a", "b"))
                / sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear)),
                5,
            ),
            "cpu_seconds": round(seconds, 2),
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str, count: int | None = None) -> tuple[float, float]:
        """Loss and accuracy."""
        x, y = (part[:count] for part in self.rows[split])
        logits = model(x)
        return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


def runs(experiments: list[str]) -> list[dict[str, Any]]:
    """The declared list."""
    listed: list[dict[str, Any]] = []
    if "planted" in experiments:
        kinds = [(mode, block) for mode in PLANTED_MODES for block in BLOCKS]
        listed += [
            {"experiment": "planted", "run": f"{mode}, true block {block}", "mode": mode, "block": block, "seed": seed}
            for mode, block in kinds
            for seed in SEEDS["planted"]
        ]
    if "fashion" in experiments:
        for seed in SEEDS["fashion"]:
            listed += [
                {"experiment": "fashion", "run": f"alone {b}x{b}", "mode": None, "block": b, "seed": seed}
                for b in BLOCKS
            ]
            listed += [
                {"experiment": "fashion", "run": name, "mode": name, "block": None, "seed": seed} for name in SELECTIONS
            ]
    return listed


def planted_table(rows: list[dict[str, Any]]) -> str:
    """How often each mode was right."""
    lines = [f"{'planted teacher':28}{'right':>10}{'one left':>10}{'seconds a run':>15}"]
    for mode in PLANTED_MODES:
        for noise in (0.0, 0.5):
            own = [row for row in rows if row["mode"] == mode and row["noise"] == noise]
            if own:
                right = sum(row["chosen"] == row["true"] for row in own)
                one = sum(row["left"] == 1 for row in own)
                name = f"{mode}, {'noisy' if noise else 'clean'}"
                total = len(own)
                lines.append(
                    f"{name:28}{f'{right} of {total}':>10}{f'{one} of {total}':>10}"
                    f"{mean(row['seconds'] for row in own):>15.1f}"
                )
    return "\n".join(lines)


def fashion_table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and what each selection chose."""
    lines = [f"{'Fashion-MNIST':26}{'val. loss':>10}{'test acc.':>10}{'params':>8}{'CPU sec.':>9}  chosen"]
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        chosen = Counter(row["chosen"] for row in own if row["chosen"] is not None)
        numbers = ("validation_loss", "test_accuracy", "params_of_dense", "cpu_seconds")
        loss, accuracy, params, seconds = (mean(row[key] for row in own) for key in numbers)
        lines.append(
            f"{name:26}{loss:>10.4f}{accuracy:>10.4f}{params:>8.4f}{seconds:>9.1f}  "
            + ", ".join(f"{block}x{block} in {count}" for block, count in sorted(chosen.items()))
        )
    alone = [row for row in rows if row["mode"] is None]
    for weight in (0.0, COST_WEIGHT):
        picked = Counter(_best_alone(alone, seed, weight) for seed in sorted({row["seed"] for row in alone}))
        lines.append(
            f"training each alone picks, cost weight {weight}: "
            + ", ".join(f"{block}x{block} in {count}" for block, count in sorted(picked.items()))
        )
    seeds = max(1, len({row["seed"] for row in alone}))
    lines.append(f"CPU seconds to train each alone, together: {sum(row['cpu_seconds'] for row in alone) / seeds:.1f}")
    return "\n".join(lines)


def _best_alone(rows: list[dict[str, Any]], seed: int, weight: float) -> int:
    own = [row for row in rows if row["seed"] == seed]
    return min(own, key=lambda row: row["validation_loss"] + weight * row["params_of_dense"])["block"]


def main() -> None:
    """Runs what is missing, then prints the tables."""
    options = parse_arguments()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["experiment"], row["run"], row["seed"]) for row in rows}
    fashion: FashionMlp | None = None
    versions = f"python {platform.python_version()}, torch {torch.__version__}, 1 thread"
    for run in tqdm([r for r in runs(options.experiments) if (r["experiment"], r["run"], r["seed"]) not in done]):
        rate = options.learning_rate or RATES[run["experiment"]]
        steps = options.steps or STEPS[run["experiment"]]
        if run["experiment"] == "planted":
            found = planted(run["mode"], run["block"], run["seed"], steps, rate)
        else:
            fashion = fashion or FashionMlp(options.dataset, steps, rate)
            select = SELECTIONS.get(run["mode"])
            selector, found = fashion.run(BLOCKS if select else [run["block"]], select, run["seed"])
            found["chosen"] = None if selector is None else chosen_block(selector)
            if selector is not None and options.picture and run["run"] == "validation" and run["seed"] == 0:
                selector.result.plot(options.picture)
        rows.append({**run, **found, "steps": steps, "learning_rate": rate, "versions": versions})
        with options.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    for name, table in (("planted", planted_table), ("fashion", fashion_table)):
        if own := [row for row in rows if row["experiment"] == name]:
            print(table(own), end="\n\n")


if __name__ == "__main__":
    main()
