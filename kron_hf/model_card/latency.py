"""How long a forward takes, against the dense model with the same function."""

import copy
import platform
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kron_hf.evaluation_mode import evaluation
from kron_hf.summary.latency import alternating_milliseconds, machine
from kron_hf.surgery import to_dense

__all__ = ["Latency", "measure_latency"]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median milliseconds of one forward.

    Attributes:
        milliseconds: Of the model.
        dense_milliseconds: Of the dense one.
        batch_size: Inputs of a forward.
        runs: Forwards of each, in turn.
        measured_on: Machine and versions.
    """

    milliseconds: float
    dense_milliseconds: float
    batch_size: int
    runs: int
    measured_on: str


def measure_latency(model: PreTrainedModel, inputs: dict[str, Any] | None = None, *, batch_size: int = 1) -> Latency:
    """Runs a model and its `to_dense` twin in turn, on the model's device.

    Args:
        model: A model; it is left as it is.
        inputs: What it is called with; None makes random images of the size that its config names.
        batch_size: Of those.

    Raises:
        ValueError: The config does not say how large images are.
    """
    inputs = inputs or _images(model.config, batch_size)
    batch: dict[str, Any] = {name: value.to(model.device) for name, value in inputs.items()}
    dense = to_dense(copy.deepcopy(model))
    with evaluation(model), evaluation(dense):
        (ours, theirs), runs = alternating_milliseconds([model, dense], batch)
    return Latency(
        milliseconds=round(ours, 3),
        dense_milliseconds=round(theirs, 3),
        batch_size=len(next(iter(batch.values()))),
        runs=runs,
        measured_on=f"{machine(model.device)}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    )


def _images(config: Any, count: int) -> dict[str, Any]:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if not isinstance(size, int):
        raise ValueError(f"measure_latency needs inputs=: this config names no image_size (a {type(config).__name__})")
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(count, channels, size, size, generator=generator)}
