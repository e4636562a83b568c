"""Builds the model of a run and what makes it sparse."""

from dataclasses import dataclass, field
from typing import Any

from recipe import Method, Model, Training
from stochastic_depth import add_drop_path
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TrainerCallback

from kron_hf import KronConfig, get_kron_model

__all__ = ["Sparse", "attach", "build_dense"]


@dataclass
class Sparse:
    """A model ready to train, and the arguments of `KronTrainer` that make it sparse."""

    model: PreTrainedModel
    trainer_options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[TrainerCallback] = field(default_factory=list)


def build_dense(
    model: Model, label_names: list[str], image_size: int, overrides: dict[str, Any], drop_path: float
) -> PreTrainedModel:
    """The dense model with random weights and stochastic depth."""
    sizes = {"image_size": image_size, **model.config, **overrides}
    if model.model_type == "swin":
        sizes["drop_path_rate"] = drop_path
    config = AutoConfig.for_model(
        model.model_type,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        **sizes,
    )
    dense = AutoModelForImageClassification.from_config(config)
    add_drop_path(dense, drop_path)
    return dense


def attach(dense: PreTrainedModel, method: Method, training: Training, target_sparsity: float) -> Sparse:
    """Makes the model what the method trains.

    Raises:
        ImportError: This kron_hf has no baselines or no selection.
        ValueError: The method does not fit the model.
    """
    if method.kind == "dense":
        return Sparse(dense)
    if method.kind == "baseline":
        from kron_hf import baselines

        callback = getattr(baselines, str(method.callback))
        options = {"block_size": method.block_size, "target_sparsity": target_sparsity, **method.options}
        return Sparse(dense, callbacks=[callback(**options)])
    options = {"factor_lr": training.factor_lr}
    if method.kind == "selection":
        from kron_hf import BlockSizeCallback  # pyright: ignore[reportAttributeAccessIssue]

        candidates: dict[str, Any] = {
            "candidate_block_sizes": list(method.block_sizes),
            "candidate_ranks": [method.rank],
        }
        model = get_kron_model(dense, KronConfig(**candidates))
        return Sparse(model, options, [BlockSizeCallback(**method.options)])
    assert method.block_size is not None
    assert method.rank is not None
    model = get_kron_model(dense, KronConfig(block_size=method.block_size, rank=method.rank))
    goal = {"target_sparsity": target_sparsity} if method.l1 is None else {"l1": method.l1}
    return Sparse(model, {**options, **goal, "sparsity_options": method.options or None})
