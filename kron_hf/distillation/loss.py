"""`DistillationLoss`: the weighted sum of the parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kron_hf.distillation.comparison import compare
from kron_hf.distillation.config import DistillationConfig
from kron_hf.distillation.parts import task_loss
from kron_hf.distillation.recorder import Recorder
from kron_hf.distillation.teacher import Teacher, check_apart

__all__ = ["DistillationLoss", "Distilled"]


@dataclass(frozen=True)
class Distilled:
    """What `DistillationLoss.compute` gives.

    Attributes:
        loss: To call `backward` on.
        parts: The parts without their weights, detached.
        outputs: What the student returned.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    outputs: Any


class DistillationLoss:
    """The loss of a student against a teacher, by default of all that both models give.

    `KronTrainer(teacher=...)` uses it by itself. In a loop of your own call `compute`. With the stock Trainer attach it
    and pass it as `compute_loss_func`; its signature gives neither inputs nor hidden states, so hooks keep them.

    The teacher runs in eval mode and without gradients, on its device and in its dtype. It belongs to no optimizer and
    is saved with nothing: pass it again when a training is resumed. A student with random weights is distilled alike.

    Args:
        teacher: Most often a dense model, copied before `get_kron_model` converted it in place. Another architecture
            may be the teacher of what both give in the same shape.
        config: Weights and options, a `DistillationConfig` or its arguments; learning rates are there.

    Raises:
        TypeError: The teacher is no module.
        ValueError: An option is out of range.

    Example:
        >>> loss = DistillationLoss(nn.Identity(), {"logits": 1.0, "task": 0.5})
        >>> loss.config.weight("task")
        0.5
    """

    def __init__(self, teacher: nn.Module, config: DistillationConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, DistillationConfig):
            config = DistillationConfig(**(config or {}))
        self.config = config
        self._teacher = Teacher(teacher, hidden=config.wants("hidden"))
        self._recorder: Recorder | None = None
        self.parts: dict[str, Tensor] = {}  # of the stock Trainer's last call, without their weights, detached

    @property
    def teacher(self) -> nn.Module:
        """The model."""
        return self._teacher.model

    def compute(self, student: nn.Module, inputs: Mapping[str, Any]) -> Distilled:
        """Runs the student and the teacher on a batch.

        Args:
            student: May be wrapped by DDP.
            inputs: What the student takes as keyword arguments; with `labels`, if it is to count its own loss.

        Raises:
            TypeError: The student is wrapped by DataParallel, or returns no dictionary.
            ValueError: A part that was asked for cannot be given, or the models do not fit together.
        """
        if isinstance(student, DataParallel):
            raise TypeError("DataParallel runs the hooks of all replicas at once; use DistributedDataParallel")
        bare = student.module if isinstance(student, DistributedDataParallel) else student
        with self.recorder(bare).recording():
            outputs = student(**inputs)
        parts = self.compare(outputs, inputs)
        task = outputs.get("loss")
        if self.config.requires("task") and task is None:
            raise ValueError("task: the student returned no loss; has the batch labels?")
        if self.config.wants("task") and task is not None:
            parts["task"] = task
        return Distilled(self.total(parts), {part: value.detach() for part, value in parts.items()}, outputs)

    def attach(self, student: nn.Module) -> Recorder:
        """For the stock `Trainer(student, ..., compute_loss_func=loss)`; call it before the Trainer is built.

        Until `remove()` of what is returned, or the end of its `with` block, the student returns its hidden states, of
        which this loss clears the outputs that it is called with.

        Raises:
            ValueError: The student is the teacher or shares parameters with it.
        """
        recorder = self.recorder(student)
        recorder.on = recorder.keep_inputs = True
        return recorder

    def __call__(
        self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """What the stock Trainer calls, with the outputs of the attached student.

        Trainer leaves it to this function to divide by the accumulation steps. From the labels it can: a batch weighs
        its share of `num_items_in_batch`. Without labels set `trainer.loss_is_scaled_for_ga = False`, which older
        versions of Trainer lack, or take `KronTrainer`; also for `label_smoothing_factor`, which Trainer forgets where
        it has a `compute_loss_func`.

        Raises:
            ValueError: No student is attached, or as for `compute`.
        """
        recorder = self._recorder
        if recorder is None or recorder.inputs is None:
            raise ValueError("no forward of an attached student came before: call attach(student)")
        inputs, recorder.inputs = recorder.inputs, None
        if labels is not None and getattr(recorder.model, "loss_type", None) == "ForCausalLM":
            raise ValueError("the labels of a causal language model must be shifted: use KronTrainer(teacher=...)")
        parts, logits = self.compare(outputs, inputs, labels), outputs.get("logits")
        share: Tensor | float = 1.0
        if labels is not None and num_items_in_batch is not None:
            share = (labels != -100).sum() / num_items_in_batch
        total = share * self.total(parts)
        self.parts = {part: value.detach() for part, value in parts.items()}
        if self.config.requires("task") and (labels is None or logits is None):
            raise ValueError("task: needs labels in the batch and logits of the student")
        if self.config.wants("task") and labels is not None and logits is not None:
            task = task_loss(logits, labels, num_items_in_batch)
            total = total + self.config.weight("task") * task
            self.parts["task"] = task.detach()
        return total

    def recorder(self, student: nn.Module) -> Recorder:
        """The hooks on a student, which are put there at the first call, or the next if they were removed."""
        if self._recorder is None or self._recorder.model is not student or not self._recorder.is_there:
            check_apart(self.teacher, student)
            if self._recorder is not None:
                self._recorder.remove()
            self._recorder = Recorder(student, hidden=self.config.wants("hidden"))
        return self._recorder

    def compare(self, outputs: Any, inputs: Mapping[str, Any], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The parts but for the task, from outputs that were recorded; clears the outputs of what was added.

        Labels that are not among the inputs tell, in a decoder, which tokens count.
        """
        assert self._recorder is not None
        student, teacher = self._recorder.take(outputs), self._teacher.states(inputs)
        return compare(student, teacher, inputs if labels is None else {**inputs, "labels": labels}, self.config)

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        first, *others = (self.config.weight(part) * value for part, value in parts.items())
        return sum(others, first)
