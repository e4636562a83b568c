"""How each method is put onto a model."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from examples.experiments.cases import Candidate
from examples.experiments.models import build_model, compared_layers, convert, kron_config
from kron_hf import Sparsifier
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
        blocks: Block size of each compared layer.
        pruner: To attach to its optimizer; None for dense, and for Kronecker layers that keep all blocks.
    """

    model: nn.Module
    blocks: dict[str, tuple[int, int]]
    pruner: Pruner | None


def prepare(candidate: Candidate, model_name: str, size: int, classes: int, total_steps: int) -> Prepared:
    """Builds the model, converts it if the candidate is Kronecker, and makes the pruner; draws from torch's seed.

    Raises:
        ValueError: The method is unknown, or an option or block size does not suit it.
    """
    model = build_model(model_name, size, classes)
    config = kron_config(model_name, candidate.block_size or (1, 1), candidate.rank or 1)
    options: dict[str, Any] = dict(candidate.options)
    blocks = {target.name: target.block_size for target in compared_layers(model, config)}
    if candidate.method == "kron":
        convert(model, config)
    if candidate.target_sparsity is not None:
        options["target_sparsity"] = candidate.target_sparsity
    if candidate.method == "kron":
        pruner = Sparsifier(model, total_steps=total_steps, **options) if options != {"target_sparsity": 0.0} else None
    elif candidate.method in BASELINES:
        pruner = BASELINES[candidate.method](block_layers(model, config), total_steps=total_steps, **options)
    elif candidate.method == "dense":
        pruner = None
    else:
        raise ValueError(f"method must be dense, kron or one of {[*BASELINES]}, got {candidate.method!r}")
    return Prepared(model=model, blocks=blocks, pruner=pruner)
