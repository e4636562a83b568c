"""Fits `W = sum_i a_i (x) b_i` to the inputs and wanted outputs of a layer, by alternating least squares on moments.

Minimised is the output error, with output weights d and the bias `mean(t) - W mean(x)`:
`sum_o d_o (W_o C W_o^T - 2 W_o G_o^T + v_o)`, C with a ridge in the fit only.
"""

import math

import torch
from torch import Tensor

from kron_hf.calibration.cholesky import cholesky, ridged
from kron_hf.calibration.half_step import Quadratic, best_coefficients
from kron_hf.calibration.low_rank import low_rank_path
from kron_hf.calibration.moments import Covariances
from kron_hf.calibration.terms import balanced_terms, orthonormal
from kron_hf.factors import kron_weight

__all__ = ["dense", "error_scale", "fit_factors", "fitted_bias", "output_error", "starting_factors"]

Factors = tuple[Tensor, Tensor]

RELAXATION = 1.7


def fit_factors(
    covariances: Covariances,
    block_size: tuple[int, int],
    rank: int,
    *,
    output_weights: Tensor | None = None,
    ridge: float = 1e-4,
    sweeps: int = 8,
    mask: Tensor | None = None,
    start: Factors | None = None,
) -> Factors:
    """Fits the factors. No sweep raises the error with its ridge; nothing is random.

    Args:
        covariances: Of the inputs and wanted outputs; computed in their dtype and on their device.
        block_size: `(bo, bi)`, dividing the two sizes of the layer. For (1, in) and (out, 1) without a mask the fit is
            `low_rank_path`'s closed form.
        rank: Number of terms.
        output_weights: d, `[out]`, not negative and not all zero; None for ones.
        ridge: Added to the diagonal of C, as a share of its mean.
        sweeps: How often A and B are each fitted once.
        mask: Blocks that may be nonzero, bool `[O, I]`; None for all.
        start: a `[r, O, I]`, b `[r, bo, bi]` to start from, with r <= rank; None for a start from the unrestricted
            least squares.

    Returns:
        a `[rank, O, I]`, b `[rank, bo, bi]`: orthogonal terms with `||a_i|| = ||b_i||`. Terms that cannot improve the
        fit have a zero b and a nonzero a: they change nothing and can still be trained.

    Raises:
        ValueError: If the block does not divide the layer, or output_weights, mask or start do not fit it.
    """
    out_features, in_features = covariances.g.shape
    _check(covariances, block_size, rank, output_weights, mask, start)
    if mask is None and block_size in {(1, in_features), (out_features, 1)}:
        return low_rank_path(covariances, output_weights=output_weights, ridge=ridge).factors(rank, block_size)
    quadratic = _quadratic(covariances, block_size, output_weights, ridge)
    a, b = _start(quadratic, rank, mask) if start is None else (each.to(covariances.c) for each in start)
    a = a if mask is None else a * mask
    cells = a[0].numel() if mask is None else int(mask.sum())
    a, b = balanced_terms(a, b, min(rank, cells, b[0].numel()), in_features, mask)
    if float(covariances.c.diagonal().max()) > 0:
        a, b = _alternate(quadratic, a, b, sweeps, mask)
    return balanced_terms(a, b, rank, in_features, mask)


def starting_factors(
    covariances: Covariances,
    block_size: tuple[int, int],
    rank: int,
    *,
    output_weights: Tensor | None = None,
    ridge: float = 1e-4,
) -> Factors:
    """Where `fit_factors` starts without a `start`; its first r terms are where it starts at rank r."""
    _check(covariances, block_size, rank, output_weights, None, None)
    return _start(_quadratic(covariances, block_size, output_weights, ridge), rank, None)


def output_error(covariances: Covariances, weight: Tensor | Factors, *, output_weights: Tensor | None = None) -> float:
    """Relative squared error of a layer's outputs, with the bias that fits best (`fitted_bias`).

    `sum_o d_o (W_o C W_o^T - 2 W_o G_o^T + v_o) / sum_o d_o v_o`: 0 for an exact fit, 1 for outputs that are constant.

    Args:
        covariances: Of the data to judge by, held out or not.
        weight: W `[out, in]`, or its factors a `[r, O, I]` and b `[r, bo, bi]`.
        output_weights: d, `[out]`; None for ones.

    Returns:
        Not negative. Where the wanted outputs are constant: 0 if those of W are, else infinity.
    """
    weight = (dense(*weight) if isinstance(weight, tuple) else weight).to(covariances.c.device).double()
    c, g, v = (each.double() for each in (covariances.c, covariances.g, covariances.v))
    d = torch.ones_like(v) if output_weights is None else output_weights.to(v)
    total = error_scale(covariances, output_weights)
    error = total + float(d @ ((weight @ c - 2 * g) * weight).sum(1))
    if total > 0:
        return max(error, 0.0) / total
    return math.inf if error > 0 else 0.0


def error_scale(covariances: Covariances, output_weights: Tensor | None = None) -> float:
    """What the errors are relative to: the weighted variance of the wanted outputs, `sum_o d_o v_o`."""
    v = covariances.v.double()
    return float(v.sum() if output_weights is None else output_weights.to(v) @ v)


def fitted_bias(covariances: Covariances, weight: Tensor | Factors) -> Tensor:
    """The bias that fits best for W `[out, in]` (or its factors), `mean(t) - W mean(x)`: `[out]`."""
    weight = (dense(*weight) if isinstance(weight, tuple) else weight).to(covariances.mean_x)
    return covariances.mean_y - weight @ covariances.mean_x


def dense(a: Tensor, b: Tensor) -> Tensor:
    """The weight of the factors, with S one."""
    return kron_weight(torch.ones_like(a[0]), a, b)


def _alternate(quadratic: Quadratic, a: Tensor, b: Tensor, sweeps: int, mask: Tensor | None) -> Factors:
    """Over-relaxed alternating least squares.

    A half step that goes `RELAXATION` times as far as its minimum still lowers the error, which is a parabola along it,
    as long as that is below 2. On activations of a ViT 8 sweeps then reach what takes 20 to 30 without.
    """
    swapped = quadratic.swapped()
    for sweep in range(sweeps):
        along, last = RELAXATION if sweep else 1.0, sweep == sweeps - 1
        basis, a = orthonormal(b, a)
        a = a + along * (best_coefficients(quadratic, basis, a, mask) - a)
        a, b = orthonormal(a, basis, mask)
        b = b + (1.0 if last else along) * (best_coefficients(swapped, a, b) - b)
    return a, b


def _quadratic(
    covariances: Covariances, block_size: tuple[int, int], output_weights: Tensor | None, ridge: float
) -> Quadratic:
    block_out, block_in = block_size
    c, g = ridged(covariances.c, ridge), covariances.g
    out_blocks, in_blocks = len(g) // block_out, len(c) // block_in
    d = torch.ones_like(g[:, 0]) if output_weights is None else output_weights.to(g)
    return Quadratic(
        c.view(in_blocks, block_in, in_blocks, block_in),
        g.reshape(out_blocks, block_out, in_blocks, block_in),
        d.view(out_blocks, block_out),
    )


def _start(quadratic: Quadratic, rank: int, mask: Tensor | None) -> Factors:
    """The best factors if C were a Kronecker product `C_I (x) C_b` and the output weights one, `d_jk = e_j f_k`.

    With Cholesky factors `C_I = L L^T`, `C_b = K K^T` the error is then the Frobenius distance of
    `D^1/2 W (L (x) K)` from the least squares solution: the nearest Kronecker sum in that metric.
    """
    out_blocks, block_out, in_blocks, block_in = quadratic.g.shape
    c, g = quadratic.c.flatten(0, 1).flatten(1), quadratic.g.flatten(0, 1).flatten(1)
    weight = torch.cholesky_solve(g.T, cholesky(c)).T.reshape(quadratic.g.shape)
    weight = weight if mask is None else weight * mask[:, None, :, None]
    between = cholesky(torch.einsum("lmpm->lp", quadratic.c))
    inside = cholesky(torch.einsum("lmln->mn", quadratic.c))
    e, f = (quadratic.d.mean(dim) for dim in (1, 0))
    e, f = (each.clamp_min(1e-6 * each.max()).sqrt() for each in (e, f))
    metric = torch.einsum("j,k,jklm,lp,mn->jpkn", e, f, weight, between, inside)
    u, values, vh = torch.linalg.svd(metric.flatten(0, 1).flatten(1), full_matrices=False)
    rank = min(rank, len(values))
    a = (u[:, :rank] * values[:rank]).T.reshape(rank, out_blocks, in_blocks) / e[:, None]
    b = vh[:rank].view(rank, block_out, block_in) / f[:, None]
    a, b = (torch.linalg.solve_triangular(root, x, upper=False, left=False) for root, x in ((between, a), (inside, b)))
    return a, b


def _check(
    covariances: Covariances,
    block_size: tuple[int, int],
    rank: int,
    output_weights: Tensor | None,
    mask: Tensor | None,
    start: Factors | None,
) -> None:
    out_features, in_features = covariances.g.shape
    block_out, block_in = block_size
    if out_features % block_out or in_features % block_in:
        raise ValueError(f"block_size {tuple(block_size)} must divide the layer, {(out_features, in_features)}")
    cells = (out_features // block_out, in_features // block_in)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if output_weights is not None:
        if tuple(output_weights.shape) != (out_features,):
            raise ValueError(f"output_weights need the shape {(out_features,)}, got {tuple(output_weights.shape)}")
        if not bool((output_weights >= 0).all() & (output_weights > 0).any() & output_weights.isfinite().all()):
            raise ValueError("output_weights must be finite, not negative and not all zero")
    if mask is not None and (tuple(mask.shape) != cells or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {cells}, got {mask.dtype} of {tuple(mask.shape)}")
    if mask is not None and not bool(mask.any()):
        raise ValueError("mask must leave at least one block, got none")
    if start is not None:
        shapes = [tuple(each.shape) for each in start]
        terms = len(start[0])
        if shapes != [(terms, *cells), (terms, *block_size)] or not 1 <= terms <= rank:
            wanted = f"a [r, {cells[0]}, {cells[1]}] and b [r, {block_out}, {block_in}] with r <= {rank}"
            raise ValueError(f"start must be {wanted}, got {shapes[0]} and {shapes[1]}")
