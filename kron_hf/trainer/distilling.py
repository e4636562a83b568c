"""A Trainer that distils its model from a teacher."""

import os
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kron_hf.distillation import DistillationConfig, DistillationLoss
from kron_hf.trainer.part_means import PartMeans
from kron_hf.trainer.safe_saving import SafeSaving

__all__ = ["Distilling"]


class Distilling(SafeSaving):
    """`SafeSaving` whose loss, in training and evaluation, is a `DistillationLoss` if it is given a teacher.

    Args:
        *args: As for `Trainer`.
        teacher: A model, which goes to the device of the training if it is on the CPU, or the name of a checkpoint of
            the student's class.
        distillation: Weights and options, a `DistillationConfig` or its arguments.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: `distillation` without a teacher, an option is out of range, the teacher is the student, or gradient
            checkpointing is reentrant.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | str | os.PathLike[str] | None = None,
        distillation: DistillationConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.distillation_loss: DistillationLoss | None = None
        if teacher is None and distillation is not None:
            raise ValueError(f"distillation={distillation!r} needs a teacher")
        super().__init__(*args, **kwargs)
        self._train_parts, self._eval_parts = PartMeans(), PartMeans()
        if teacher is None:
            return
        model = self._load(teacher) if isinstance(teacher, (str, os.PathLike)) else teacher
        self.distillation_loss = DistillationLoss(model, distillation)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process with {self.args.n_gpu} GPUs trains under DataParallel, which cannot be distilled; start "
                "one process a GPU with torchrun or accelerate launch"
            )
        if self.distillation_loss.config.wants("hidden") and _is_reentrant(self.args):
            raise ValueError("hidden states have no gradient if the checkpointing of activations is use_reentrant=True")
        if self.place_model_on_device and all(p.device.type == "cpu" for p in model.parameters()):
            model.to(self.args.device)
        if self.model is not None:
            self.distillation_loss.recorder(self.model)  # before anything compiles or wraps it
        if not self.label_names:
            self.can_return_loss = True  # a backbone has a loss to evaluate now

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._train_parts = PartMeans()
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss, or with a teacher the weighted sum of the parts, Trainer's loss among them.

        The parts are means over the examples of the batch, and so count the same in every accumulation step. Trainer's
        loss is weighted against the labels of all steps and processes where Trainer does so.
        """
        if self.distillation_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        task, outputs = self._task_loss(model, inputs, num_items_in_batch)
        parts = self.distillation_loss.compare(outputs, inputs)
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
        trainer_divides = model.training and not self._is_scaled(num_items_in_batch)
        if not trainer_divides:  # Trainer's loss is a share of all steps already
            parts = {part: value / steps for part, value in parts.items()}
        if task is not None:
            parts["task"] = task
        means = {part: value.detach() / (steps if trainer_divides else 1) for part, value in parts.items()}
        if model.training:
            self._train_parts.add(means, 1 / steps)
        else:
            examples = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim())
            self._eval_parts.add({part: examples * value for part, value in means.items()}, examples)
        loss = self.distillation_loss.total(parts)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, with the parts among the metrics."""
        self._eval_parts = PartMeans()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._eval_parts.pop(self.accelerator.gather)
        cast(dict[str, float], output.metrics).update(
            {f"{metric_key_prefix}_distill_{part}": value for part, value in means.items()}
        )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the parts, without their weights, to the logs of the training loss."""
        if "loss" in logs:
            means = self._train_parts.pop(self.accelerator.gather)
            logs.update({f"distill_{part}": value for part, value in means.items()})
        super().log(logs, start_time)

    def _task_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor | None, Any]:
        """Trainer's loss, None without labels, and the recorded outputs."""
        assert self.distillation_loss is not None
        config = self.distillation_loss.config
        labelled = any(inputs.get(name) is not None for name in self.label_names)
        if config.requires("task") and not labelled:
            raise ValueError(f"task={config.task} was asked for, but the batch has no {' or '.join(self.label_names)}")
        # With model_init each training has a model of its own.
        recorder = self.distillation_loss.recorder(self.accelerator.unwrap_model(cast(nn.Module, self.model)))
        with recorder.recording():
            if config.wants("task") and labelled:
                return cast(tuple[Tensor, Any], super().compute_loss(model, dict(inputs), True, num_items_in_batch))
            return None, model(**inputs)

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer takes its loss for a share of all accumulation steps, which it then does not divide."""
        own = getattr(self, "loss_is_scaled_for_ga", None)  # not in older versions
        if own is not None:
            return own
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _load(self, checkpoint: str | os.PathLike[str]) -> nn.Module:
        student = self.accelerator.unwrap_model(cast(nn.Module, self.model))
        while not isinstance(student, PreTrainedModel):
            if not hasattr(student, "get_base_model"):
                name = type(student).__name__
                raise ValueError(f"teacher={str(checkpoint)!r}: {name} is no PreTrainedModel; pass the loaded model")
            student = student.get_base_model()  # of PEFT
        return type(student).from_pretrained(checkpoint)


def _is_reentrant(args: TrainingArguments) -> bool:
    names = ("activation_checkpointing", "gradient_checkpointing")  # the second in older versions
    on = any(getattr(args, name, None) for name in names)
    return on and any((getattr(args, f"{name}_kwargs", None) or {}).get("use_reentrant") for name in names)
