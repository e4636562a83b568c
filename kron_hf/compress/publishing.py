"""Saves a compressed model with its image processor, its card and the comparison, and uploads it if that is wanted."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kron_hf.command.trainer import CommandTrainer
from kron_hf.compress.comparison import Comparison
from kron_hf.compress.task import Task

__all__ = ["publish", "publisher"]


def publisher(model: PreTrainedModel, task: Task) -> CommandTrainer:
    """A trainer that saves into the output directory; it makes the repository on the Hub, if one is wanted.

    Raises:
        OSError: The Hub refuses, or does not answer.
    """
    options = task.options
    arguments = task.arguments(
        Path(options.output_dir),
        push_to_hub=options.push_to_hub,
        hub_model_id=options.hub_model_id,
        hub_private_repo=options.hub_private_repo,
        hub_token=options.hub_token,
    )
    return CommandTrainer(model, arguments, processing_class=task.processor)


def publish(model: PreTrainedModel, task: Task, comparison: Comparison, *, base: str, settings: dict[str, Any]) -> None:
    """Writes everything into the output directory, `config.json` last: before that no loader takes it for a model.

    Args:
        model: The compressed model.
        task: The images.
        comparison: The report.
        base: The dense model's id or directory; of a directory nothing is told.
        settings: How it was compressed.
    """
    trainer = publisher(model, task)
    shown = "validation" if task.splits.test is None else "test"
    trainer.card_dataset, trainer.card_split = task.splits.name, shown
    trainer.card_metrics = {
        name.removeprefix(f"{shown}_"): value
        for name, value in comparison.compressed.items()
        if name.startswith(f"{shown}_")
    }
    trainer.card_report = str(comparison)
    trainer.card_options = {
        "base_model": None if Path(base).exists() else base,
        "training": {**settings, "seed": task.options.seed, "batch_size": task.options.batch_size},
        "history": None,
    }
    content = json.dumps(comparison.to_dict(), indent=2)
    Path(task.options.output_dir, "comparison.json").write_text(f"{content}\n", encoding="utf-8")
    if task.options.push_to_hub:
        trainer.push_to_hub()  # saves and writes the card first
    else:
        trainer.save_model()
        trainer.create_model_card()
