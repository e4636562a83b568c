"""Calibration data as the batches that a transformers model takes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import default_collate
from transformers import default_data_collator

from kron_hf.calibration.batches import Batches, is_label
from kron_hf.calibration_config import CalibrationConfig
from kron_hf.escaping import shown

__all__ = ["model_batches"]


def model_batches(model: nn.Module, data: Any, options: CalibrationConfig) -> Batches:
    """The batches of calibration data, in the dtype and on the device of a model."""
    parameter = next(model.parameters())
    return Batches(
        data,
        collate=_collate_for(model),
        batch_size=options.batch_size,
        seed=options.seed,
        device=parameter.device,
        dtype=parameter.dtype,
    )


def _collate_for(model: nn.Module) -> Callable[[list[Any]], Any]:
    """Trainer's default collator, on the columns that the model takes."""
    accepted = [name for name in inspect.signature(model.forward).parameters if not is_label(name)]

    def collate(examples: list[Any]) -> Any:
        first = [each[0] if isinstance(each, tuple | list) else each for each in examples]
        if not isinstance(first[0], Mapping):
            return default_collate(first)
        columns = [{name: value for name, value in each.items() if name in accepted} for each in first]
        if not columns[0]:
            raise ValueError(
                f"calibration_data has the columns {shown(sorted(map(str, first[0])))}, and {type(model).__name__} "
                f"takes none of them, but {', '.join(accepted)}: let the model's processor make its inputs of the data"
            )
        return default_data_collator(columns)

    return collate
