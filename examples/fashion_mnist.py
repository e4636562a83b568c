"""Experiment: a small ViT on Fashion-MNIST, dense against Kronecker at several block sparsities, at equal steps.

Writes one JSON line a run, skips the runs that the file already holds, and prints the mean over the seeds.

python examples/fashion_mnist.py --output examples/results/fashion_mnist.jsonl
"""

import argparse
import json
import os
import platform
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import torch
from tqdm.auto import tqdm

from kron_hf import kron_summary
from kron_hf.demo.images import ImageData, load_image_data
from kron_hf.demo.training import Recipe, accuracy, train

COLUMNS = {
    "test_accuracy": "{:.4f}",
    "validation_accuracy": "{:.4f}",
    "sparsity": "{:.3f}",
    "trained_params": "{:,.0f}",
    "deployed_params": "{:,.0f}",
    "flops_of_dense": "{:.3f}",
    "seconds": "{:.0f}",
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist", help="digits, fashion_mnist or a folder with IDX files")
    parser.add_argument("--output", type=Path, default=Path("examples/results/fashion_mnist.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the same base rate for all")
    return parser.parse_args()


def run(recipe: Recipe, data: ImageData, name: str, kronecker: bool, seed: int) -> dict[str, Any]:
    """One training; the test images are only read for the result."""
    with tqdm(total=recipe.steps(len(data.train)), desc=f"{name}, seed {seed}") as bar:
        rate = recipe.learning_rates[0]
        trained = train(recipe, data, rate, kronecker=kronecker, seed=seed, on_step=bar.update)
    summary = kron_summary(trained.model)
    dense_flops = summary.converted.dense_forward_flops
    return {
        "model": name,
        "seed": seed,
        "test_accuracy": accuracy(trained.model, data.test),
        "validation_accuracy": trained.validation_accuracy,
        "sparsity": summary.sparsity,
        "trained_params": summary.trained_params,
        "deployed_params": summary.deployed_params,
        "flops_of_dense": summary.converted.forward_flops / dense_flops if kronecker else 1.0,
        "seconds": round(trained.seconds, 1),
        "steps": recipe.steps(len(data.train)),
        "recipe": {**vars(recipe), "target_sparsity": recipe.target_sparsity if kronecker else None},
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    }


def mean_table(rows: list[dict[str, Any]]) -> str:
    """Mean over the seeds, a line for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [["model", "seeds", *COLUMNS]]
    for model in models:
        own = [row for row in rows if row["model"] == model]
        means = [style.format(mean(row[key] for row in own)) for key, style in COLUMNS.items()]
        lines.append([model, str(len(own)), *means])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main() -> None:
    """Runs what is missing, then prints the table."""
    options = parse_arguments()
    data = load_image_data(options.dataset)
    recipe = Recipe(
        hidden_size=options.hidden_size,
        layers=options.layers,
        patch_size=4,
        epochs=options.epochs,
        batch_size=64,
        learning_rates=(options.learning_rate,),
        block_size=(4, 8),
        rank=4,
    )
    models = {"dense": None} | {f"Kronecker {sparsity:.0%}": sparsity for sparsity in options.sparsities}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    rows = [json.loads(line) for line in lines]
    for seed in options.seeds:
        for name, sparsity in models.items():
            if any((row["model"], row["seed"]) == (name, seed) for row in rows):
                continue
            used = Recipe(**{**vars(recipe), "target_sparsity": sparsity or 0.0})
            rows.append(run(used, data, name, sparsity is not None, seed))
            with options.output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(mean_table(rows))


if __name__ == "__main__":
    main()
