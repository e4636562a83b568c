"""Which sparsity leaves a given number of nonzeros in the compared layers, as `kron_hf`'s meter will count them."""

from functools import cache

import torch

from examples.experiments.cases import Candidate
from examples.experiments.models import build_model, compared_layers, kron_config

__all__ = ["sparsity_for"]


def sparsity_for(nonzeros: int, model: str, size: int, classes: int, candidate: Candidate) -> float | None:
    """The target sparsity at which the compared layers have so many nonzeros; None if they cannot have them."""
    dependent, fixed = _full_count(model, size, classes, candidate)
    sparsity = round(1 - (nonzeros - fixed) / dependent, 5)
    return sparsity if 0 <= sparsity < 1 else None


@cache
def _full_count(model: str, size: int, classes: int, candidate: Candidate) -> tuple[int, int]:
    """Nonzeros with all blocks alive: those that come and go with blocks, and those that stay."""
    with torch.device("meta"):
        built = build_model(model, size, classes)
    rank, dependent, fixed = candidate.rank, 0, 0
    for target in compared_layers(built, kron_config(model, candidate.block_size or (1, 1), rank or 1)):
        block_out, block_in = target.block_size
        entries = target.linear.weight.numel()
        fixed += 0 if target.linear.bias is None else target.linear.bias.numel()
        fixed += 0 if rank is None else rank * block_out * block_in
        dependent += entries if rank is None else entries // (block_out * block_in) * (1 + rank)
    return dependent, fixed
