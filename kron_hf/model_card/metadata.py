"""The YAML that the Hub reads at the head of a card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from torch import nn

from kron_hf.claims import MetricClaim
from kron_hf.model_card.usage import base_name

__all__ = ["card_data", "checked_license", "find_base"]


def card_data(
    model: nn.Module, name: str, metrics: Sequence[MetricClaim], *, base_model: str | None, license: str | None
) -> ModelCardData:
    """Library, tags, task, base, licence and results of a model.

    Args:
        model: The model.
        name: What it is called.
        metrics: What was measured.
        base_model: Id of the model that it was made from.
        license: Its licence, as the Hub abbreviates it.
    """
    options: dict[str, Any] = {"library_name": "transformers", "tags": ["kron_hf", "kronecker", "block-sparse"]}
    base: nn.Module = model
    if isinstance(model, PeftModel):
        base, options["library_name"] = model.get_base_model(), "peft"
    is_classifier = type(base).__name__.endswith("ForImageClassification")
    if is_classifier:
        options["pipeline_tag"] = "image-classification"
    options |= {key: value for key, value in (("base_model", base_model), ("license", license)) if value}
    datasets = list(dict.fromkeys(metric.dataset for metric in metrics if _is_hub_id(metric.dataset)))
    if datasets:
        options["datasets"] = datasets
    if metrics:
        options["metrics"] = list(dict.fromkeys(metric.metric for metric in metrics))
        options["model_name"] = name
        options["eval_results"] = [_result(metric, is_classifier) for metric in metrics]
    return ModelCardData(**options)


def find_base(model: nn.Module) -> str | None:
    """The model on the Hub that this one was loaded from: a folder of this machine is not told."""
    if isinstance(model, PeftModel):
        return base_name(model)
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not isinstance(name, str) or not name or Path(name).exists():
        return None
    try:  # a relative path may look like an id, but is in no cache of the Hub
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except HFValidationError:
        return None


def checked_license(license: str | None) -> str | None:
    """An abbreviation as the Hub lists them: `apache-2.0`, `mit`, `cc-by-4.0`, `other`.

    Raises:
        ValueError: It is none.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", license):
        raise ValueError(f"a licence must be the Hub's abbreviation, such as 'apache-2.0' or 'other', got {license!r}")
    return license


def _result(metric: MetricClaim, is_classifier: bool) -> EvalResult:
    return EvalResult(
        task_type="image-classification" if is_classifier else "other",
        dataset_type=re.sub(r"[^\w./-]+", "-", metric.dataset, flags=re.ASCII).strip("-") or "unnamed",
        dataset_name=metric.dataset,
        dataset_split=metric.split or None,
        metric_type=metric.metric,
        metric_value=metric.value,
    )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
