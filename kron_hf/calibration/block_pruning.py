"""Prunes blocks of a fitted layer by what they do to its outputs, and refits what remains.

Leaving out block (p, q) of W raises the output error by `tr(D_p W_pq C_qq W_pq^T)`: exactly so where the factors are
fitted, since the error is then stationary in the direction of each block. (What the other blocks could make up for,
Hassibi and Stork's optimal brain surgeon of 1992, chooses no better blocks: `examples/conversion/saliency.py`.)
Pruning in rounds with a refit between them does choose better ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kron_hf.calibration.fit import Factors, dense, error_scale, fit_factors
from kron_hf.calibration.moments import Covariances
from kron_hf.sparsity.pruning import SCOPES, choose_blocks, cubic_sparsity

__all__ = ["block_saliency", "prune_gradually", "prune_layers", "refit"]


def block_saliency(
    covariances: Covariances, s: Tensor | None, a: Tensor, b: Tensor, output_weights: Tensor | None = None
) -> Tensor:
    """What leaving out each block alone adds to the relative squared output error (`fit.output_error`).

    `sum_k d_pk W_pq,k C_qq W_pq,k^T / sum_o d_o v_o`, so that the blocks of different layers compare. Where the wanted
    outputs are constant it is not divided.

    Args:
        covariances: Of the inputs and wanted outputs.
        s: `[O, I]`, or None for ones.
        a: `[rank, O, I]`.
        b: `[rank, bo, bi]`.
        output_weights: d, `[out]`; None for ones.

    Returns:
        `[O, I]`, not negative; zero for a block that is zero.
    """
    a, b = a.to(covariances.c), b.to(covariances.c)
    weight = dense(a if s is None else a * s.to(a), b)
    (_, out_blocks, in_blocks), (_, block_out, block_in) = a.shape, b.shape
    blocks = weight.view(out_blocks, block_out, in_blocks, block_in)
    own = covariances.c.view(in_blocks, block_in, in_blocks, block_in).diagonal(dim1=0, dim2=2)  # [bi, bi, I]
    added = (torch.einsum("jklm,mnl->jkln", blocks, own) * blocks).sum(3)
    if output_weights is not None:
        added = added * output_weights.to(added).view(out_blocks, block_out, 1)
    total = error_scale(covariances, output_weights)
    return added.sum(1).clamp_min(0) / (total if total > 0 else 1.0)


def prune_layers(
    saliencies: Sequence[Tensor], entries: Sequence[int], target_sparsity: float, scope: str = "global"
) -> list[Tensor]:
    """The blocks of each layer that stay, bool `[O, I]`.

    Args:
        saliencies: `[O, I]` of each layer (`block_saliency`), where wanted times the sensitivity of the layer.
        entries: Entries of one block of each layer, `bo * bi`.
        target_sparsity: Share of the entries of all layers that shall lie in pruned blocks, in [0, 1). It is reached by
            less than one block; the last block of a layer stays.
        scope: "global": the least salient blocks of all layers; "layer": the same share of each.

    Raises:
        ValueError: If target_sparsity or scope is none of these, or a saliency is NaN.
    """
    if not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity must be at least 0 and below 1, got {target_sparsity}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if any(bool(saliency.isnan().any()) for saliency in saliencies):
        raise ValueError("saliencies must not be NaN")
    within = sum(n * (saliency.numel() - 1) for n, saliency in zip(entries, saliencies, strict=True))
    total = sum(n * saliency.numel() for n, saliency in zip(entries, saliencies, strict=True))
    share = min(target_sparsity, (within - 0.5) / total)  # what can be pruned; half an entry less rounds up to it
    return [~pruned for pruned in choose_blocks(list(saliencies), list(entries), max(share, 0.0), scope)]


def refit(
    covariances: Covariances,
    mask: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    output_weights: Tensor | None = None,
    ridge: float = 1e-4,
    sweeps: int = 8,
) -> Factors:
    """Fits the blocks that the mask `[O, I]` leaves, starting from a and b (`fit.fit_factors`)."""
    size = (b.shape[1], b.shape[2])
    start = (a * mask.to(a), b)
    return fit_factors(
        covariances, size, len(a), output_weights=output_weights, ridge=ridge, sweeps=sweeps, mask=mask, start=start
    )


def prune_gradually(
    covariances: Covariances,
    a: Tensor,
    b: Tensor,
    dead_blocks: int,
    *,
    output_weights: Tensor | None = None,
    ridge: float = 1e-4,
    rounds: int = 4,
    sweeps: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes one layer in rounds by the cubic schedule, with a refit of two sweeps between them and a full one last.

    Args:
        covariances: Of the inputs and wanted outputs.
        a: Fitted, `[rank, O, I]`.
        b: Fitted, `[rank, bo, bi]`.
        dead_blocks: Blocks to prune, at least 0 and fewer than there are; over several layers `prune_layers` says how
            many of each.
        output_weights: d, `[out]`; None for ones.
        ridge: As in the fit.
        rounds: Number of rounds, at least 1.
        sweeps: Of the last refit.

    Returns:
        The mask of the blocks that stay, bool `[O, I]`, and the refitted a and b.
    """
    blocks = a[0].numel()
    if not 0 <= dead_blocks < blocks or rounds < 1:
        wanted = f"dead_blocks must be at least 0 and below {blocks}, rounds at least 1"
        raise ValueError(f"{wanted}, got {dead_blocks} and {rounds}")
    mask = torch.ones_like(a[0], dtype=torch.bool)
    for turn in range(1, rounds + 1):
        count = round(dead_blocks * cubic_sparsity(turn, start_step=0, end_step=rounds, final=1.0))
        saliency = block_saliency(covariances, None, a, b, output_weights)
        order = saliency.masked_fill(~mask, -1.0).flatten().argsort(stable=True)  # the dead stay dead
        mask = mask.flatten().index_fill(0, order[:count], False).view_as(mask)
        left = sweeps if turn == rounds else 2
        a, b = refit(covariances, mask, a, b, output_weights=output_weights, ridge=ridge, sweeps=left)
    return mask, a, b
