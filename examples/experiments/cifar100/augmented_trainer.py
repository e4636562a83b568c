"""`KronTrainer` that augments on the device, and counts its time across resumes."""

import time
from typing import Any

import torch
from augmentation import Augmentation
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from kron_hf import KronTrainer

__all__ = ["AugmentedTrainer", "Clock"]


class AugmentedTrainer(KronTrainer):
    """Training batches are raw images, which `Augmentation` turns into the model's input just before the forward.

    Evaluation batches come ready for the model.

    Args:
        *args: As for `KronTrainer`.
        augmentation: What to do.
        **kwargs: As for `KronTrainer`.
    """

    def __init__(self, *args: Any, augmentation: Augmentation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.augmentation = augmentation
        self._place = (-1, 0)  # optimizer steps done, batches since then

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, on the augmented batch."""
        if model.training:
            pixels, labels = self.augmentation(
                inputs["pixel_values"], inputs["labels"], rank=self.args.process_index, **self._count()
            )
            inputs = {"pixel_values": pixels, "labels": labels}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count(self) -> dict[str, int]:
        step, done = self._place
        self._place = (step, done + 1) if step == self.state.global_step else (self.state.global_step, 0)
        return {"step": self._place[0], "micro_batch": self._place[1]}


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, validations among them, over all parts of a training that was resumed."""

    def __init__(self) -> None:
        self.before, self.began = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Until now."""
        return self.before + time.monotonic() - self.began

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in trainer_state.json."""
        return {"args": {}, "attributes": {"before": self.seconds}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts, from what the checkpoint holds."""
        saved: Any = state.stateful_callbacks.get(type(self).__name__)
        self.before = saved["attributes"]["before"] if state.global_step > 0 and saved else 0.0
        self.began = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
