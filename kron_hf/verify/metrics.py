"""Measures a model again on the data that its metrics are claimed for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from kron_hf.claims import Claims, MetricClaim
from kron_hf.command.checkpoint import check_head
from kron_hf.command.images import load_images
from kron_hf.command.metric import load_metric
from kron_hf.command.options import DataOptions
from kron_hf.command.processor import load_image_processor, model_channels
from kron_hf.data.examples import Examples
from kron_hf.data.splits import ImageSplits, LabelledImages
from kron_hf.evaluation_mode import evaluation
from kron_hf.verify.report import Check, compared, unchecked

__all__ = ["check_metrics"]

# Other machines round differently, and one image in a thousand may fall to the other side of a border.
TOLERANCE = 1e-3
BATCH = 64


def check_metrics(model: Any, directory: Path, claims: Claims, options: DataOptions | None) -> list[Check]:
    """Compares the claimed metrics with what is measured now; without data none can be.

    Raises:
        OSError: The data or the image processor cannot be read.
        ValueError: The model is not for the classes of the data.
    """
    if options is None:
        why = "pass --dataset to measure it"
        return unchecked([(_label(metric), metric.value) for metric in claims.metrics], why)
    splits = load_images(options, None)
    check_head(directory.name, model.config, splits.label_names)
    processor = load_image_processor(str(directory))
    if processor is None:
        raise FileNotFoundError("there is no image processor beside the model, so its metrics cannot be measured")
    measured: dict[str, dict[str, float]] = {}
    checks: list[Check] = []
    for metric in claims.metrics:
        images = _images(metric, splits)
        if images is None or len({each.dataset for each in claims.metrics} - {splits.name}) > 1:
            checks += unchecked([(_label(metric), metric.value)], f"{splits.name} has no such images")
            continue
        if metric.split not in measured:
            measured[metric.split] = _measure(model, Examples(images, processor, model_channels(model.config)), options)
        found = measured[metric.split].get(metric.metric)
        if found is None:
            checks += unchecked([(_label(metric), metric.value)], "pass --metric to measure it")
        else:
            checks.append(compared(_label(metric), metric.value, found, tolerance=TOLERANCE))
    return checks


def _images(metric: MetricClaim, splits: ImageSplits) -> LabelledImages | None:
    return splits.validation if metric.split == "validation" else splits.test


@torch.no_grad()
def _measure(model: Any, examples: Examples, options: DataOptions) -> dict[str, float]:
    compute = load_metric(options.metric, options.metric_options)[1]
    logits: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    with evaluation(model):
        for begin in range(0, len(examples), BATCH):
            rows = examples.__getitems__(list(range(begin, min(begin + BATCH, len(examples)))))
            pixels = torch.stack([row["pixel_values"] for row in rows]).to(model.device, model.dtype)
            logits.append(model(pixel_values=pixels).logits.float().cpu().numpy())
            labels += [row["labels"] for row in rows]
    outputs, targets = np.concatenate(logits), np.asarray(labels)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(outputs), torch.from_numpy(targets)).item()
    return {"loss": loss, **compute(EvalPrediction(predictions=outputs, label_ids=targets))}


def _label(metric: MetricClaim) -> str:
    return f"{metric.metric} on {metric.dataset}{f', {metric.split}' if metric.split else ''}"
