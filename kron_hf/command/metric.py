"""The metric that a command measures with, through `evaluate`."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import EvalPrediction

from kron_hf.escaping import one_line

__all__ = ["load_metric"]


def load_metric(name: str | None, options: str | None) -> tuple[str, Callable[[EvalPrediction], dict[str, float]]]:
    """The name of the metric, and the function that Trainer computes it with.

    Args:
        name: What `evaluate.load` loads; None is the accuracy that this package carries.
        options: Arguments for the metric, `key=value,...`.

    Raises:
        OSError: The metric cannot be loaded.
        ValueError: `options` are not of that form.
    """
    import evaluate

    from kron_hf.metrics.accuracy import Accuracy

    given = _parsed(options)
    try:
        # In memory: processes would have to share the files. Our own needs no copy in evaluate's cache either.
        metric = Accuracy(keep_in_memory=True) if name is None else evaluate.load(name, keep_in_memory=True)
    except (OSError, ValueError) as error:
        reason = one_line(str(error))
        raise OSError(f"--metric {name} could not be loaded: {reason}") from error

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        results = metric.compute(predictions=logits.argmax(-1), references=prediction.label_ids, **given)
        assert results is not None
        return {key: float(np.asarray(value)) for key, value in results.items() if np.ndim(value) == 0}

    return str(metric.name), compute


def _parsed(options: str | None) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for part in (options or "").split(",") if options else []:
        key, sign, value = part.partition("=")
        if not sign or not key.isidentifier():
            raise ValueError(f"--metric-options must be key=value,..., got {options!r}")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed
