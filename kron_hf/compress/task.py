"""The images of a compression as its model takes them, and how well a model does on them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback

from kron_hf.command.figures import named_figures
from kron_hf.command.options import PublishedArguments
from kron_hf.command.trainer import CommandTrainer
from kron_hf.compress.arguments import HealingOptions
from kron_hf.data.examples import Examples
from kron_hf.data.splits import ImageSplits, LabelledImages

__all__ = ["Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the parts of a compression have in common.

    Attributes:
        splits: The images.
        processor: Makes pixels of them.
        channels: That the model takes.
        metric: Trainer's `compute_metrics`.
        options: Batch size, seed, precision.
        flip: Whether to mirror half of the images in training.
    """

    splits: ImageSplits
    processor: Any
    channels: int
    metric: Callable[[Any], dict[str, float]]
    options: HealingOptions
    flip: bool = False

    def examples(self, images: LabelledImages) -> Examples:
        """Rows of `pixel_values` and `labels`."""
        return Examples(images, self.processor, self.channels)

    def training_examples(self) -> Examples:
        """The same of the training images, mirrored if that is wanted."""
        return Examples(self.splits.train, self.processor, self.channels, flip=self.flip, seed=self.options.seed)

    def sample(self, count: int) -> Examples:
        """Some of the training images, in an order that does not depend on their number."""
        return self.some(self.splits.train, count)

    def some(self, images: LabelledImages, count: int) -> Examples:
        """The same of other images."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.options.seed))
        return self.examples(images.keep(order[:count].tolist()))

    def arguments(self, output_dir: Path, **more: Any) -> PublishedArguments:
        """Arguments for a trainer that writes there."""
        options = self.options
        common = {
            "per_device_train_batch_size": options.batch_size,
            "per_device_eval_batch_size": options.batch_size,
            "logging_steps": options.logging_steps,
            "dataloader_num_workers": options.dataloader_num_workers,
            "dataloader_pin_memory": torch.accelerator.is_available() and not options.use_cpu,
            "seed": options.seed,
            "use_cpu": options.use_cpu,
            "disable_tqdm": options.disable_tqdm,
            "save_strategy": "no",
            "report_to": "none",
        }
        return PublishedArguments(output_dir=str(output_dir), **common | more)

    def measure(self, model: PreTrainedModel, images: LabelledImages, name: str) -> dict[str, float]:
        """The figures of a model on some images, as `name_accuracy`."""
        examples = self.examples(images)
        trainer = CommandTrainer(model, self.arguments(Path()), eval_dataset=examples, compute_metrics=self.metric)
        trainer.remove_callback(PrinterCallback)
        return named_figures(trainer.evaluate(), "eval", name)
