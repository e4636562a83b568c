"""Trains the two models of the demo, with one recipe and the stock `Trainer`."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from kron_hf.callbacks import SparsityCallback
from kron_hf.config import KronConfig
from kron_hf.demo.images import ImageData
from kron_hf.model import get_kron_model
from kron_hf.param_groups import kron_param_groups

__all__ = ["Recipe", "Trained", "accuracy", "build_model", "search", "train"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the dense model and its Kronecker twin have in common, and what the twin adds.

    Attributes:
        hidden_size: Width of the ViT; its MLP is twice as wide.
        layers: Number of its layers.
        patch_size: Pixels along one side of a patch of the image.
        epochs: Passes over the training images, in every run.
        batch_size: Images a step.
        learning_rates: Base rates that are tried for both models, each in a full run; validation accuracy decides.
        weight_decay: For weights, A and B; none for S, biases and norms.
        block_size: Of the Kronecker layers.
        rank: Of the Kronecker layers.
        target_sparsity: Share of zero blocks that the twin is trained to.
    """

    hidden_size: int = 96
    layers: int = 3
    patch_size: int = 4
    epochs: int = 60
    batch_size: int = 120
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    weight_decay: float = 0.05
    block_size: int | tuple[int, int] = (2, 8)
    rank: int = 4
    target_sparsity: float = 0.5

    def steps(self, images: int) -> int:
        """Optimizer steps of one run."""
        return self.epochs * -(-images // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, with what was measured on the way; nothing of it comes from the test images."""

    model: ViTForImageClassification
    learning_rate: float
    validation_accuracy: float
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


def build_model(recipe: Recipe, data: ImageData, *, kronecker: bool, seed: int) -> ViTForImageClassification:
    """A small ViT with random weights, dense or with Kronecker layers."""
    set_seed(seed)
    names = dict(enumerate(data.label_names))
    config = ViTConfig(
        image_size=data.size,
        patch_size=recipe.patch_size,
        num_channels=1,
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        initializer_range=0.1,  # .02 is meant for wide models; at this width it costs points
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = ViTForImageClassification(config)
    return get_kron_model(model, KronConfig(block_size=recipe.block_size, rank=recipe.rank)) if kronecker else model


def train(
    recipe: Recipe, data: ImageData, learning_rate: float, *, kronecker: bool, seed: int, on_step: Callable[[], Any]
) -> Trained:
    """One run: builds the model, trains it with the stock `Trainer`, measures it on the validation images."""
    model = build_model(recipe, data, kronecker=kronecker, seed=seed)
    callbacks: list[TrainerCallback] = [_OnStep(on_step)]
    if kronecker:
        callbacks.append(SparsityCallback(target_sparsity=recipe.target_sparsity))
    groups = kron_param_groups(model, learning_rate, weight_decay=recipe.weight_decay)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.steps(len(data.train)) // 20,
            save_strategy="no",
            logging_steps=20,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data.train,
            callbacks=callbacks,
            optimizers=(torch.optim.AdamW(groups, fused=True), None),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return Trained(
        model=model,
        learning_rate=learning_rate,
        validation_accuracy=accuracy(model, data.validation),
        seconds=seconds,
        history=trainer.state.log_history,
    )


def search(recipe: Recipe, data: ImageData, *, kronecker: bool, seed: int, on_step: Callable[[], Any]) -> list[Trained]:
    """One full run at each rate of the recipe, the best on the validation images first."""
    runs = [
        train(recipe, data, rate, kronecker=kronecker, seed=seed, on_step=on_step) for rate in recipe.learning_rates
    ]
    return sorted(runs, key=lambda run: -run.validation_accuracy)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Dataset) -> float:
    """Accuracy by `evaluate`, with the metric script that this package carries."""
    import evaluate

    from kron_hf.metrics import ACCURACY

    metric = evaluate.load(ACCURACY)
    model.eval()
    for rows in images.iter(batch_size=256):
        batch = cast(dict[str, Any], rows)
        logits = model(pixel_values=torch.stack(batch["pixel_values"]).to(model.device)).logits
        metric.add_batch(predictions=logits.argmax(-1).cpu(), references=batch["labels"])
    result = metric.compute()
    assert result is not None
    return float(result["accuracy"])


class _OnStep(TrainerCallback):
    def __init__(self, on_step: Callable[[], Any]) -> None:
        self.on_step = on_step

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_step()
