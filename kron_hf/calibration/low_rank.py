"""The closed form for low rank, blocks (1, in) and (out, 1): all ranks at once.

With `C' = C + ridge = L L^T` and output weights D the best W of rank r is `W = G L^-T V V^T L^-1`, with V the first r
right singular vectors of `D^1/2 G L^-T` (activation-aware low rank: reduced-rank regression, Izenman, 1975).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kron_hf.calibration.cholesky import cholesky, ridged
from kron_hf.calibration.moments import Covariances
from kron_hf.calibration.terms import balanced_terms

__all__ = ["LowRankPath", "low_rank_path"]


@dataclass(frozen=True, eq=False)
class LowRankPath:
    """The best fits of rank 1, 2, ... min(out, in): that of rank r is `sum_i<r left_i right_i^T`.

    Attributes:
        left: `[min(out, in), out]`.
        right: `[min(out, in), in]`.
        covariances: What they were fitted to.
        output_weights: `[out]`, or None for ones.
    """

    left: Tensor
    right: Tensor
    covariances: Covariances
    output_weights: Tensor | None

    def errors(self, held_out: Covariances | None = None) -> Tensor:
        """Relative squared output error of each rank 1, 2, ... (`fit.output_error`), `[min(out, in)]`.

        Args:
            held_out: Covariances of other data; None for those of the fit.
        """
        moments = self.covariances if held_out is None else held_out
        weights = (
            moments.v.new_ones(len(moments.v)) if self.output_weights is None else self.output_weights.to(moments.v)
        )
        total = weights @ moments.v
        if not float(total):
            return torch.zeros_like(moments.v[: len(self.left)])
        left, right = self.left.to(moments.c), self.right.to(moments.c)
        weighted = left * weights
        overlap = (weighted @ left.T) * (right @ moments.c @ right.T)
        added = 2 * overlap.tril().sum(1) - overlap.diagonal() - 2 * ((weighted @ moments.g) * right).sum(1)
        return ((total + added.cumsum(0)) / total).clamp_min(0)

    def factors(self, rank: int, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The best fit of that rank as a `[rank, O, I]`, b `[rank, bo, bi]`, for blocks (1, in) or (out, 1)."""
        out_features, in_features = self.left.shape[1], self.right.shape[1]
        left, right = self.left[:rank], self.right[:rank]
        if block_size == (1, in_features):
            return balanced_terms(left[:, :, None], right[:, None, :], rank, in_features)
        if block_size == (out_features, 1):
            return balanced_terms(right[:, None, :], left[:, :, None], rank, in_features)
        wanted = f"{(1, in_features)} or {(out_features, 1)}"
        raise ValueError(f"low rank needs blocks of {wanted}, got {tuple(block_size)}")


def low_rank_path(
    covariances: Covariances, *, output_weights: Tensor | None = None, ridge: float = 1e-4
) -> LowRankPath:
    """Fits low rank at all ranks.

    Args:
        covariances: Of the inputs and wanted outputs; computed in their dtype.
        output_weights: `[out]`, not negative; None for ones.
        ridge: Added to the diagonal of C, as a share of its mean.
    """
    factor = cholesky(ridged(covariances.c, ridge))
    whitened = torch.linalg.solve_triangular(factor, covariances.g.T, upper=False).T  # G L^-T
    weighted = whitened if output_weights is None else whitened * output_weights.to(whitened).sqrt()[:, None]
    _, _, vh = torch.linalg.svd(weighted, full_matrices=False)
    right = torch.linalg.solve_triangular(factor.T, vh.T, upper=True).T  # rows v^T L^-1
    return LowRankPath(vh @ whitened.T, right, covariances, output_weights)
