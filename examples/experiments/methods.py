"""How each method is put onto a model."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from examples.experiments.cases import Candidate
from examples.experiments.models import build_model, compared_layers, convert, kron_config
from kron_hf import KronConfig, Sparsifier
from kron_hf.baselines import (
    BlockRigL,
    ElasticGroupLasso,
    GradualPruning,
    GroupLasso,
    IterativePruning,
    block_layers,
)

__all__ = ["BASELINES", "Prepared", "prepare"]

BASELINES = {
    "group_lasso": GroupLasso,
    "elastic_group_lasso": ElasticGroupLasso,
    "block_rigl": BlockRigL,
    "iterative_pruning": IterativePruning,
    "gradual_pruning": GradualPruning,
}


class Pruner(Protocol):
    """What makes blocks zero while an optimizer trains."""

    def attach(self, optimizer: Optimizer) -> None:
        """Runs after every step of the optimizer from now on."""
        ...

    def close(self) -> None:
        """Ends the training."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: The model.
        layers: The compared linears by name, each with its blocks; none if they have become Kronecker layers.
        pruner: To attach to its optimizer; None for dense, and for Kronecker layers that keep all blocks.
    """

    model: nn.Module
    layers: dict[str, tuple[nn.Linear, tuple[int, int]]]
    pruner: Pruner | None


def prepare(candidate: Candidate, model_name: str, size: int, classes: int, total_steps: int) -> Prepared:
    """Builds the model, converts it if the candidate is Kronecker, and makes the pruner; draws from torch's seed.

    Raises:
        ValueError: The method is unknown, or an option or block size does not suit it.
    """
    model = build_model(model_name, size, classes)
    config = kron_config(model_name, candidate.block_size or (1, 1), candidate.rank or 1)
    layers = {target.name: (target.linear, target.block_size) for target in compared_layers(model, config)}
    if candidate.method == "kron":
        convert(model, config)
        layers = {}
    return Prepared(model=model, layers=layers, pruner=_make_pruner(candidate, model, config, total_steps))


def _make_pruner(candidate: Candidate, model: nn.Module, config: KronConfig, total_steps: int) -> Pruner | None:
    options: dict[str, Any] = {name: value for name, value in candidate.options if name != "factor_lr"}
    if candidate.target_sparsity is not None:
        options["target_sparsity"] = candidate.target_sparsity
    if candidate.method in BASELINES:
        return BASELINES[candidate.method](block_layers(model, config), total_steps=total_steps, **options)
    if candidate.method not in ("dense", "kron"):
        raise ValueError(f"method must be dense, kron or one of {[*BASELINES]}, got {candidate.method!r}")
    keeps_all = candidate.method == "dense" or options == {"target_sparsity": 0.0}
    return None if keeps_all else Sparsifier(model, total_steps=total_steps, **options)
