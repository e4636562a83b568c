"""Checkpoints that keep the names of a model's tensors.

transformers renames tensors on saving to the names of its older versions, ViT's for one. `from_pretrained` reads both;
but Trainer's resume and `load_best_model_at_end` use plain `load_state_dict` and skip what has another name: all of
the encoder stays as it was, and a warning is all that tells. The private attribute `_weight_conversions` of
transformers' models, which says how to rename, is touched in this file and in no other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = ["came_from_files", "forget_tensor_names", "keep_tensor_names", "tensor_names_kept"]

_ABSENT: Any = object()


def keep_tensor_names(model: nn.Module) -> None:
    """From now on the transformers models in a model save their tensors under the names that they have."""
    for part in _parts(model):
        _set(part, [])


def forget_tensor_names(model: nn.Module) -> None:
    """From now on they save their tensors as transformers does for a model that was built from its config."""
    for part in _parts(model):
        _set(part, _ABSENT)


@contextmanager
def tensor_names_kept(model: nn.Module) -> Iterator[None]:
    """`keep_tensor_names` for a while."""
    before = {part: vars(part).get("_weight_conversions", _ABSENT) for part in _parts(model)}
    keep_tensor_names(model)
    try:
        yield
    finally:
        for part, value in before.items():
            _set(part, value)


def came_from_files(model: nn.Module) -> bool:
    """Whether `from_pretrained` made it, or the model that it is a copy of; or its names are kept."""
    return "_weight_conversions" in vars(model)


def _parts(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _set(part: Any, value: Any) -> None:
    if value is not _ABSENT:
        part._weight_conversions = value
    elif came_from_files(part):
        del part._weight_conversions
