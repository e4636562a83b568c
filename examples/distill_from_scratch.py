"""Trains a small Kronecker-sparse ViT from scratch, alone and with a dense teacher, and compares them.

python -m examples.distill_from_scratch --dataset digits --output-dir runs/scratch

The rate of each is chosen by its mean validation accuracy over the seeds; the test images are read for that one alone.
"""

import argparse
import os
from statistics import mean, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from kron_hf import KronTrainer
from kron_hf.demo.images import ImageData, load_image_data
from kron_hf.demo.training import Recipe, build_model


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="digits, fashion_mnist or a folder with IDX files")
    parser.add_argument("--output-dir", default="runs/scratch")
    parser.add_argument("--block-size", type=int, nargs=2, default=[2, 8], metavar=("OUT", "IN"))
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1.5e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def train(options: argparse.Namespace, data: ImageData, rate: float, seed: int, **teacher: PreTrainedModel) -> Trainer:
    """A trained student within its trainer."""
    recipe = Recipe(block_size=tuple(options.block_size), rank=options.rank)
    return fit(KronTrainer, build_model(recipe, data, kronecker=True, seed=seed), options, data, rate, seed, **teacher)


def fit(
    kind: type[Trainer],
    model: PreTrainedModel,
    options: argparse.Namespace,
    data: ImageData,
    rate: float,
    seed: int,
    **teacher: PreTrainedModel,
) -> Trainer:
    """Trains a model with a `Trainer` or a `KronTrainer`."""
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=120,
        per_device_eval_batch_size=256,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share of all steps
        weight_decay=0.05,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = kind(model, arguments, train_dataset=data.train, compute_metrics=compute_metrics, **teacher)
    trainer.train()
    return trainer


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy; a model may give more than logits."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def best(trainers: dict[float, list[Trainer]], data: ImageData) -> tuple[float, list[float]]:
    """The rate with the best mean validation accuracy, and the test accuracies of its runs."""
    scores = {rate: mean(accuracies(runs, data.validation)) for rate, runs in trainers.items()}
    rate = max(scores, key=lambda each: scores[each])
    return rate, accuracies(trainers[rate], data.test)


def accuracies(trainers: list[Trainer], images: Dataset) -> list[float]:
    """Of each on some images."""
    return [trainer.evaluate(images)["eval_accuracy"] for trainer in trainers]


def main() -> None:
    """Trains the teacher, then the students, and prints a table."""
    options = parse_arguments()
    data = load_image_data(options.dataset)
    rates, seeds = options.learning_rates, range(options.seeds)
    fresh = [build_model(Recipe(), data, kronecker=False, seed=0) for _ in rates]
    dense = {rate: [fit(Trainer, model, options, data, rate, 0)] for rate, model in zip(rates, fresh, strict=True)}
    rate, found = best(dense, data)
    teacher, rows = dense[rate][0].model, [("dense, the teacher", rate, found)]
    for name, own in (("student alone", {}), ("student with the teacher", {"teacher": teacher})):
        students = {rate: [train(options, data, rate, seed, **own) for seed in seeds] for rate in rates}
        rows.append((name, *best(students, data)))
    print("| model | rate | test accuracy |\n|---|---|---|")
    for name, rate, found in rows:
        spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
        print(f"| {name} | {rate:g} | {mean(found):.4f}{spread} |")


if __name__ == "__main__":
    main()
