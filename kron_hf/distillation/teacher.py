"""The teacher: in eval mode, without gradients, on its own device and in its own dtype."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.distillation.recorder import Recorder
from kron_hf.distillation.states import States

__all__ = ["Teacher", "check_apart"]

_NOT_FOR_THE_TEACHER = {"num_items_in_batch", "output_hidden_states", "output_attentions", "return_dict", "return_loss"}


class Teacher:
    """Runs a teacher; nothing of it is changed but that it is put into eval mode.

    Args:
        model: Any model that takes the student's inputs.
        hidden: Whether the hidden states are wanted.
    """

    def __init__(self, model: nn.Module, hidden: bool) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"the teacher must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._recorder = Recorder(model, hidden)
        self._arguments = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any]) -> States:
        """What the teacher makes of the inputs of the student."""
        self.model.eval()  # at each call: someone may have called train()
        own = {name: self._moved(value) for name, value in inputs.items() if self._takes(name)}
        with self._recorder.recording():
            outputs = self.model(**own)
        return self._recorder.take(outputs)

    def _takes(self, name: str) -> bool:
        if name in _NOT_FOR_THE_TEACHER:
            return False
        if "label" in name or name in ("start_positions", "end_positions"):  # its loss is not asked for
            return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))
        return name in self._arguments or any(each.kind is each.VAR_KEYWORD for each in self._arguments.values())

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if own is None:
            return value
        return value.to(own.device, own.dtype if value.is_floating_point() else None)


def check_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Refuses a teacher that the training of the student would change.

    Raises:
        ValueError: They are one model, or share parameters.
    """
    own = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if teacher is student or shared:
        what = "is the student itself" if teacher is student else f"shares parameters with it ({shared[0]!r}, ...)"
        raise ValueError(
            f"the teacher must be a model apart from the student, but it {what}; get_kron_model converts in place, so "
            "make the teacher before: teacher = copy.deepcopy(model)"
        )
