"""Compares what a student and a teacher made of one batch, part by part; refuses what does not fit together."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kron_hf.distillation.config import DistillationConfig
from kron_hf.distillation.parts import cosine_distance, kl_divergence, relative_mse
from kron_hf.distillation.states import States, inputs_of_output, token_mask

__all__ = ["compare"]

Inputs = Mapping[str, Any]


def compare(student: States, teacher: States, inputs: Inputs, config: DistillationConfig) -> dict[str, Tensor]:
    """The parts that the config wants and both models give, without their weights.

    Raises:
        ValueError: A part was asked for by name and one model cannot give it, there is none at all, or both give one
            in different shapes.
    """
    inputs = inputs_of_output(inputs, student)
    parts = {}
    for part, formula in _FORMULAS.items():
        if config.wants(part) and (pair := _pair(part, student, teacher, config)) is not None:
            parts[part] = formula(*pair, inputs, config)
    if not parts:
        raise ValueError(
            f"nothing to distil: {student.model} and the teacher, {teacher.model}, have neither logits nor tokens nor "
            "hidden states in common"
        )
    return parts


def _pair(part: str, student: States, teacher: States, config: DistillationConfig) -> tuple[Any, Any] | None:
    asked = config.requires(part)
    own, other = student.get(part, asked), teacher.get(part, asked)
    if own is not None and other is not None:
        return own, other
    if asked:
        who, model = ("teacher", teacher.model) if own is not None else ("student", student.model)
        raise ValueError(
            f"{part}={getattr(config, part)} was asked for, but the {who}, {model}, gives no {_NAMES[part]}; leave "
            f"{part} out"
        )
    return None


_NAMES = {
    "logits": "logits for a softmax",
    "tokens": "last_hidden_state",
    "cls": "class token",
    "hidden": "hidden_states",
}


def _logits(own: Tensor, other: Tensor, inputs: Inputs, config: DistillationConfig) -> Tensor:
    _check("logits", own, other, "labels")
    return kl_divergence(own, other.to(own.device), config.temperature, token_mask(inputs, own))


def _tokens(own: Tensor, other: Tensor, inputs: Inputs, config: DistillationConfig) -> Tensor:
    _check("tokens", own, other)
    return relative_mse(own, other.to(own.device), token_mask(inputs, own))


def _cls(own: Tensor, other: Tensor, inputs: Inputs, config: DistillationConfig) -> Tensor:
    _check("cls", own, other)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not mask[:, 0].all():
        raise ValueError("cls: the first token is padding; pad on the right, or leave cls out")
    return cosine_distance(own, other.to(own.device))


def _hidden(own: tuple[Tensor, ...], other: tuple[Tensor, ...], inputs: Inputs, config: DistillationConfig) -> Tensor:
    layers = config.hidden_layers
    if layers is None and len(own) != len(other):
        raise ValueError(
            f"hidden: the student has {len(own)} hidden states, the teacher {len(other)}; name those that both have "
            "with hidden_layers, or pass hidden=0"
        )
    errors = []
    for layer in range(len(own)) if layers is None else layers:
        if not all(-len(states) <= layer < len(states) for states in (own, other)):
            raise ValueError(
                f"hidden_layers has {layer}, but the student has {len(own)} hidden states and the teacher {len(other)}"
            )
        _check("hidden", own[layer], other[layer])
        errors.append(relative_mse(own[layer], other[layer].to(own[layer].device), token_mask(inputs, own[layer])))
    return torch.stack(errors).mean()


_FORMULAS: dict[str, Callable[[Any, Any, Inputs, DistillationConfig], Tensor]] = {
    "logits": _logits,
    "tokens": _tokens,
    "cls": _cls,
    "hidden": _hidden,
}


def _check(part: str, own: Tensor, other: Tensor, features: str = "features") -> None:
    """Both numbers of the first size that differs."""
    if own.shape == other.shape:
        return
    sizes = {"dimensions": (own.dim(), other.dim())}
    if own.dim() == other.dim():
        names = ["examples", "tokens", features] if own.dim() == 3 else ["examples", features]
        sizes = dict(zip(names, zip(own.shape, other.shape, strict=True), strict=True))
    name, (first, second) = next(each for each in sizes.items() if each[1][0] != each[1][1])
    raise ValueError(
        f"{part}: the student has {first} {name}, the teacher {second}; they must be equal, or pass {part}=0"
    )
