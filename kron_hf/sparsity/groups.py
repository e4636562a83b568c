"""Whole rows and columns of blocks: how pruning prefers them, how the l1 mode penalises them, how many are empty.

A zero row of S, `S[j, :]`, makes `bo` output features of a layer constant, a zero column, `S[:, l]`, makes it ignore
`bi` input features: unlike scattered zeros, both can be cut out of the factors, which saves time. `group_penalty`,
g in [0, 1], says how much whole groups count against single blocks, in both modes of `Sparsifier`:

- With a target, blocks are ranked by `importance_jl ** (1 - g) * group_jl ** g`, where `group_jl` is the root mean
  square of the importance over the row j, over the column l, or, for "both", the smaller of the two. The unit stays
  that of the importance, the root mean square of the entries. At g = 1 the weakest rows or columns go as a whole.
- Under l1 the penalty is that of the sparse group lasso (Simon, Friedman, Hastie, Tibshirani, 2013, eq. 3),
  `l1 / n * sum_layers ((1 - g) * ||S||_1 + g * sum_groups sqrt(size) * ||S_group||_2)`: the one term is a mean of |s|,
  the other of the root mean square of s in a group. For "both" rows and columns get half of g each.
"""

from functools import partial

import torch
from torch import Tensor

from kron_hf.kron_layer import KronLayer
from kron_hf.sparsity.pruning import Regroup, block_masks

__all__ = ["GROUPS", "REDUCED_DIMS", "empty_columns", "empty_rows", "group_factor", "group_importance", "regrouping"]

# The dimensions of S [O, I] that one group runs along.
REDUCED_DIMS: dict[str, tuple[int, ...]] = {"rows": (1,), "columns": (0,), "both": (1, 0)}
GROUPS = tuple(REDUCED_DIMS)


def regrouping(group_penalty: float, groups: str) -> Regroup | None:
    """What `choose_dead` does to the importance; None for nothing."""
    return partial(group_importance, group_penalty=group_penalty, groups=groups) if group_penalty else None


def group_importance(importance: Tensor, group_penalty: float, groups: str) -> Tensor:
    """`importance_jl ** (1 - g) * group_jl ** g`, see above; scores that are not positive are marks and stay."""
    squares = importance.clamp_min(0).square()
    means = [squares.mean(dim, keepdim=True).sqrt().expand_as(importance) for dim in REDUCED_DIMS[groups]]
    group = torch.stack(means).amin(0)
    mixed = importance.clamp_min(0) ** (1 - group_penalty) * group**group_penalty
    return torch.where(importance > 0, mixed, importance)


def group_factor(squares: Tensor, weight: float) -> Tensor:
    """By what the group soft threshold multiplies a group: `max(0, 1 - weight / ||S_group / step_size||_2)`.

    Zero exactly where the proximal map of `weight * ||S_group||_2` in the metric of the optimizer is; equal to that
    map where the step sizes in the group are. With one step size it is `max(0, 1 - step_size * weight / ||S_group||)`.

    Args:
        squares: `sum (S_group / step_size) ** 2` of each group.
        weight: Weight of the group's norm in the loss.
    """
    norms = squares.sqrt()
    return (1 - weight / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0.0)


def empty_rows(layers: list[KronLayer]) -> float:
    """Share of the output features of all layers whose whole row of blocks is zero, in [0, 1].

    If layers are sharded (FSDP2), all processes must call it.
    """
    return _empty(layers, dim=1)


def empty_columns(layers: list[KronLayer]) -> float:
    """Share of the input features of all layers whose whole column of blocks is zero, in [0, 1].

    If layers are sharded (FSDP2), all processes must call it.
    """
    return _empty(layers, dim=0)


def _empty(layers: list[KronLayer], dim: int) -> float:
    dead = [~alive.any(dim) for alive in block_masks(layers)]
    sizes = [layer.block_size[1 - dim] for layer in layers]  # a row holds bo features, a column bi
    total = sum(len(mask) * size for mask, size in zip(dead, sizes, strict=True))
    return sum(int(mask.sum()) * size for mask, size in zip(dead, sizes, strict=True)) / total if total else 0.0
