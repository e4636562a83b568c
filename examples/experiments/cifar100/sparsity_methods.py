"""Builds the model of a run and what makes it sparse."""

from typing import Any

from recipe import Method, Model, Training
from stochastic_depth import add_drop_path
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TrainerCallback

from kron_hf import KronConfig, get_kron_model

__all__ = ["build_dense", "convert", "trainer_settings"]


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


def convert(dense: PreTrainedModel, method: Method) -> PreTrainedModel:
    """The model that the method trains, in place.

    Raises:
        ValueError: The block size does not fit the model.
    """
    if method.kind == "kron":
        assert method.block_size is not None
        assert method.rank is not None
        return get_kron_model(dense, KronConfig(block_size=method.block_size, rank=method.rank))
    if method.kind == "selection":
        sizes: dict[str, Any] = {
            "candidate_block_sizes": list(method.block_sizes),
            "candidate_ranks": [method.rank],
        }
        return get_kron_model(dense, KronConfig(**sizes))
    return dense


def trainer_settings(
    method: Method, training: Training, target_sparsity: float | None, held_out: Any
) -> tuple[dict[str, Any], list[TrainerCallback]]:
    """The arguments of `KronTrainer` that make the model sparse, and the callbacks.

    Args:
        method: How it becomes sparse.
        training: Of all runs.
        target_sparsity: To train to, if the method has a target.
        held_out: Data to choose a block size by.

    Raises:
        ValueError: An option of the method is unknown or out of range.
    """
    if method.kind == "dense":
        return {}, []
    if method.kind == "baseline":
        from kron_hf import baselines

        callback = getattr(baselines, str(method.callback))
        return {}, [callback(block_size=method.block_size, target_sparsity=target_sparsity, **method.options)]
    factor_lr = {"factor_lr": training.factor_lr}
    if method.kind == "selection":
        from kron_hf import BlockSizeCallback

        return factor_lr, [BlockSizeCallback(eval_dataset=held_out, **method.options)]
    goal = {"target_sparsity": target_sparsity} if method.l1 is None else {"l1": method.l1}
    return {**factor_lr, **goal, "sparsity_options": method.options or None}, []
