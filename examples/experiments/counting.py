"""One meter for both sides: block sparsity and nonzeros of the compared layers, from their tensors."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from examples.experiments.cases import Candidate
from examples.experiments.models import build_model, compared_layers, kron_config
from kron_hf.layers import KronLinear

__all__ = ["Blocks", "Count", "count", "full_count", "sparsity_for"]

Blocks = dict[str, tuple[int, int]]  # block size by the name of the layer


@dataclass(frozen=True, kw_only=True)
class Count:
    """What the compared layers hold; biases count whole.

    Attributes:
        entries: Of the dense weights they have or stand for.
        zero_entries: Of these, those in blocks that are exactly zero.
        nonzeros: Kronecker: a living block counts 1 in S and `rank` in A, B counts whole. Dense: all entries of living
            blocks.
    """

    entries: int
    zero_entries: int
    nonzeros: int

    @property
    def sparsity(self) -> float:
        """Share of the entries in zero blocks."""
        return self.zero_entries / self.entries


def count(model: nn.Module, blocks: Blocks) -> Count:
    """Counts the layers that `blocks` names."""
    entries = zeros = nonzeros = 0
    for name, (block_out, block_in) in blocks.items():
        layer = model.get_submodule(name)
        if isinstance(layer, KronLinear):
            alive = layer.block_mask
            living = int(alive.sum())
            nonzeros += living * (1 + layer.rank) + (layer.b.numel() if living else 0)
        else:
            assert isinstance(layer, nn.Linear)
            alive = _alive_blocks(layer.weight, block_out, block_in)
            living = int(alive.sum())
            nonzeros += living * block_out * block_in
        nonzeros += 0 if layer.bias is None else layer.bias.numel()
        entries += alive.numel() * block_out * block_in
        zeros += (alive.numel() - living) * block_out * block_in
    return Count(entries=entries, zero_entries=zeros, nonzeros=nonzeros)


def _alive_blocks(weight: Tensor, block_out: int, block_in: int) -> Tensor:
    out_features, in_features = weight.shape
    cut = weight.view(out_features // block_out, block_out, in_features // block_in, block_in)
    return (cut != 0).any(3).any(1)


@cache
def full_count(model: str, size: int, classes: int, candidate: Candidate) -> tuple[int, int]:
    """Nonzeros of the compared layers with all blocks alive: those that come and go with blocks, and the others."""
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


def sparsity_for(nonzeros: int, model: str, size: int, classes: int, candidate: Candidate) -> float | None:
    """The target sparsity at which the compared layers have so many nonzeros; None if they cannot have them."""
    dependent, fixed = full_count(model, size, classes, candidate)
    sparsity = round(1 - (nonzeros - fixed) / dependent, 5)
    return sparsity if 0 <= sparsity < 1 else None
