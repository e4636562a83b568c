"""A sum of Kronecker products `W = sum_i a_i (x) b_i` in its canonical form: orthogonal terms of balanced scales."""

import torch
from torch import Tensor

from kron_hf.factors import balanced_std

__all__ = ["balanced_terms", "orthonormal"]


def orthonormal(factors: Tensor, others: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Makes `factors` `[r, p, q]` orthonormal and changes `others` `[r, ...]` so that the sum of products stays.

    Factors that depend on the rest are replaced by new directions, with zeros in `others`.

    Args:
        factors: A or B, with r at most the number of their entries (that the mask leaves).
        others: B or A.
        mask: The entries `[p, q]` of `factors` that may be nonzero; None for all.
    """
    mask = torch.ones_like(factors[0], dtype=torch.bool) if mask is None else mask
    q, triangle = torch.linalg.qr(factors[:, mask].T)
    basis = torch.zeros_like(factors)
    basis[:, mask] = q.T
    return basis, (triangle @ others.flatten(1)).view_as(others)


def balanced_terms(
    a: Tensor, b: Tensor, rank: int, in_features: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same sum as `rank` terms, orthogonal and sorted by norm, with `||a_i|| = ||b_i||`.

    Terms that the sum does not need have a zero b, and a nonzero a, so that they can still be trained
    (`kron_hf.factors.nearest_kronecker` does the same).

    Args:
        a: `[r, O, I]`, r <= rank.
        b: `[r, bo, bi]`, r <= bo * bi.
        rank: Number of terms wanted.
        in_features: Size of x; sets the scale where the sum is zero.
        mask: Entries `[O, I]` of every a that may be nonzero; those of the given a outside it are zero. None for all.
    """
    alive = torch.ones_like(a[0], dtype=torch.bool) if mask is None else mask
    flat_a, flat_b = a[:, alive], b.flatten(1)
    qa, ra = torch.linalg.qr(flat_a.T)
    qb, rb = torch.linalg.qr(flat_b.T)
    u, values, vh = torch.linalg.svd(ra @ rb.T, full_matrices=False)
    largest = float(values[0]) if len(values) else 0.0
    kept = int((values > largest * torch.finfo(a.dtype).eps * max(len(flat_a.T), len(flat_b.T))).sum())
    root = values[:kept].sqrt()
    variance = largest and float(values.square().sum()) / (a[0].numel() * b[0].numel())
    generator = torch.Generator().manual_seed(0)  # the global generator is the caller's
    spare = torch.randn(rank, *a.shape[1:], generator=generator, dtype=torch.float64)
    new_a = spare.to(a) * balanced_std(rank, variance or 1 / (3 * in_features))
    new_b = b.new_zeros(rank, *b.shape[1:])
    new_a[:, ~alive] = 0
    new_a[:kept, alive] = ((qa @ u[:, :kept]) * root).T
    new_b[:kept] = ((qb @ vh[:kept].T) * root).T.view(kept, *b.shape[1:])
    return new_a, new_b
