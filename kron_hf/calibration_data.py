"""Calibration data as the batches that a transformers model takes.

The decoder of an encoder-decoder model starts from tokens that its own forward makes of the labels.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import default_data_collator

from kron_hf.calibration.batches import Batch, Batches, few_examples, is_label
from kron_hf.calibration.decoder import DECODER_INPUTS, DECODER_MASK
from kron_hf.calibration.passes import run
from kron_hf.calibration_config import CalibrationConfig
from kron_hf.escaping import one_line, shown

__all__ = ["check_batch", "model_batches"]


def model_batches(model: nn.Module, data: Any, options: CalibrationConfig) -> Batches:
    """The batches of calibration data, in the dtype and on the device of a model."""
    parameter = next(model.parameters())
    prepare = _decoder_starts(model)
    return Batches(
        data,
        collate=_collate_for(model, with_labels=prepare is not None),
        prepare=prepare,
        batch_size=options.batch_size,
        seed=options.seed,
        device=parameter.device,
        dtype=parameter.dtype,
    )


def check_batch(model: nn.Module, batch: Batch) -> None:
    """Runs a model, in evaluation mode, on a few examples of its data.

    Raises:
        ValueError: Its forward refuses them, as where something is missing.
    """
    try:
        run(model, few_examples(batch))
    except (AttributeError, TypeError, ValueError) as error:  # of None, where an argument is missing
        given = ", ".join(map(shown, batch)) if "" not in batch else "a tensor"
        raise ValueError(
            f"{type(model).__name__} does not take a batch of calibration_data that holds {given}: "
            f"{one_line(str(error))}{_advice(model, batch)}"
        ) from error


def _advice(model: nn.Module, batch: Batch) -> str:
    accepted, main = inspect.signature(model.forward).parameters, getattr(model, "main_input_name", None)
    if main in accepted and "" not in batch and main not in batch:
        return f". Give {main}, too"
    if DECODER_INPUTS[0] in accepted and not any(name in batch for name in DECODER_INPUTS):
        return f". Give {DECODER_INPUTS[0]}, too" + (", or labels to make them of" if _shift(model) else "")
    return ""


def _shift(model: nn.Module) -> Callable[..., Tensor] | None:
    """The method that transformers' own collators call."""
    return getattr(model, "prepare_decoder_input_ids_from_labels", None)


def _decoder_starts(model: nn.Module) -> Callable[[Batch], Batch] | None:
    """Adds the decoder's inputs to a batch with labels; None for a model that does not make them of labels."""
    shift, accepted = _shift(model), inspect.signature(model.forward).parameters
    if shift is None or DECODER_INPUTS[0] not in accepted:
        return None

    def prepare(batch: Batch) -> Batch:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or any(name in batch for name in DECODER_INPUTS):
            return batch
        added = {DECODER_INPUTS[0]: shift(labels=labels)}
        if DECODER_MASK in accepted and DECODER_MASK not in batch and labels.ndim == 2:
            added[DECODER_MASK] = (labels != -100).long()
        return {**batch, **added}

    return prepare


def _collate_for(model: nn.Module, *, with_labels: bool) -> Callable[[list[Any]], Any]:
    """Trainer's default collator, on the columns that the model takes."""
    accepted = [name for name in inspect.signature(model.forward).parameters if not is_label(name)]
    columns_taken = {*accepted, *(["labels"] if with_labels else [])}

    def collate(examples: list[Any]) -> Any:
        first = [each[0] if isinstance(each, tuple | list) else each for each in examples]
        if not isinstance(first[0], Mapping):
            return _stacked(first)
        columns = [{name: value for name, value in each.items() if name in columns_taken} for each in first]
        if not columns[0]:
            raise ValueError(
                f"calibration_data has the columns {shown(sorted(map(str, first[0])))}, and {type(model).__name__} "
                f"takes none of them, but {', '.join(accepted)}: let the model's processor make its inputs of the data"
            )
        return _collated(columns)

    return collate


def _collated(examples: list[dict[str, Any]]) -> Any:
    try:
        return default_data_collator(examples)
    except (RuntimeError, TypeError, ValueError) as error:  # as of torch.stack and torch.tensor
        raise ValueError(
            f"examples of calibration_data, which hold {shown(sorted(examples[0]))}, make no batch: "
            f"{one_line(str(error))}. Pad texts to one length, or pass a DataLoader with a collator that does"
        ) from error


def _stacked(examples: list[Any]) -> Any:
    try:
        return default_collate(examples)
    except TypeError as error:
        raise TypeError(
            f"calibration_data holds examples of type {type(examples[0]).__name__}, which make no tensor: let the "
            "model's processor make its inputs of the data"
        ) from error
