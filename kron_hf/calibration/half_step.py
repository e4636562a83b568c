"""One half step of the alternating least squares: the best A for given B, or (with the roles swapped) B for given A.

With `W = sum_i A_i (x) B_i`, blocks (bo, bi), O x I of them, the weighted error
`sum_jk d_jk (W_jk C W_jk^T - 2 W_jk G_jk^T)` is quadratic in A. Its block rows j are independent; that of row j has the
unknowns a_j `[r * I]` and the normal equations `M_j a_j = h_j`:
`M_j[(i,l),(i',l')] = sum_k d_jk B_i[k,:] C[l,:,l',:] B_i'[k,:]^T`, `h_j[(i,l)] = sum_k d_jk B_i[k,:] . G[jk,l,:]`.
Where the output weights are a product `d_jk = e_j f_k` (none, blocks of one row, ...) one matrix serves all rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor

from kron_hf.calibration.cholesky import cholesky

__all__ = ["Quadratic", "best_coefficients", "shared_system"]

ENTRIES = 2**26  # the most numbers held at a time for the matrices of the separate rows
ITERATIONS, TOLERANCE = 10, 1e-8  # of the conjugate gradients; the tolerance is for the squared residual


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The error as a function of W, indexed by blocks.

    Attributes:
        c: C with its ridge, `[I, bi, I, bi]`.
        g: G, `[O, bo, I, bi]`.
        d: Output weights, `[O, bo]`, not negative, not all zero.
    """

    c: Tensor
    g: Tensor
    d: Tensor

    def swapped(self) -> "Quadratic":
        """The same with the roles of A and B exchanged."""
        c, g = (each.permute(1, 0, 3, 2).contiguous() for each in (self.c, self.g))
        return Quadratic(c, g, self.d.T.contiguous())

    @cached_property
    def pairs(self) -> Tensor:
        """C as a map from pairs of columns within a block to pairs of blocks, `[bi * bi, I * I]`."""
        return self.c.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)

    @cached_property
    def common(self) -> Tensor:
        """The weights within a block row, averaged over the rows: f of the best `d = e f`, `[bo]`."""
        return self.d.sum(0) / self.d.sum()

    @cached_property
    def within(self) -> Tensor:
        """The weights within each block row, which alone decide about its solution: `d / e`, `[O, bo]`."""
        totals = self.d.sum(1, keepdim=True)
        return torch.where(totals > 0, self.d / totals, self.common)

    @cached_property
    def separable(self) -> bool:
        """Whether all rows share one system."""
        rounding = 100 * torch.finfo(self.d.dtype).eps
        return bool((self.within - self.common).abs().max() <= rounding * self.common.max())


def best_coefficients(quadratic: Quadratic, basis: Tensor, start: Tensor, mask: Tensor | None = None) -> Tensor:
    """The A that minimises the error for given B; never worse than `start`.

    One Cholesky factorisation if all block rows share their system; one for each row if output weights or a mask make
    them differ; and where that would cost more than `ITERATIONS` products with C (large `r * I`), that many steps of
    conjugate gradients from `start`, preconditioned by the system of the averaged output weights.

    Args:
        quadratic: The error.
        basis: B, `[r, bo, bi]`, orthonormal in the Frobenius norm, so that M_j is no worse conditioned than C.
        start: A to start from, `[r, O, I]`, zero outside the mask.
        mask: Blocks that may be nonzero, `[O, I]` bool.

    Returns:
        `[r, O, I]`.
    """
    right = _by_a(quadratic, basis, quadratic.g)
    if mask is None and quadratic.separable:
        return start + _step(shared_system(quadratic, basis), _rows(right).T, _rows(start).T, start)
    if _costs_less_by_rows(quadratic, len(basis), mask):
        return _solve_rows(quadratic, basis, right, start, mask)
    return _conjugate_gradients(quadratic, basis, right, start, mask)


def shared_system(quadratic: Quadratic, basis: Tensor, weights: Tensor | None = None) -> Tensor:
    """M for the output weights `weights` `[bo]` within a row, `common` if None: `[r * I, r * I]`."""
    rank, in_blocks = len(basis), len(quadratic.c)
    weights = quadratic.common if weights is None else weights
    products = torch.einsum("k,rkm,qkn->rqmn", weights, basis, basis).flatten(0, 1).flatten(1)  # [r * r, bi * bi]
    system = (products @ quadratic.pairs).view(rank, rank, in_blocks, in_blocks)
    return system.transpose(1, 2).reshape(rank * in_blocks, rank * in_blocks)


def _by_a(quadratic: Quadratic, basis: Tensor, by_weight: Tensor) -> Tensor:
    """The gradient by A `[r, O, I]` of an unweighted gradient by W `[O, bo, I, bi]`."""
    weighted = (by_weight * quadratic.within[:, :, None, None]).transpose(1, 2)  # [O, I, bo, bi]
    return (weighted.flatten(2) @ basis.flatten(1).T).permute(2, 0, 1)


def _rows(a: Tensor) -> Tensor:
    """The unknowns of each block row: `[r, O, I]` to `[O, r * I]`."""
    return a.transpose(0, 1).flatten(1)


def _step(system: Tensor, right: Tensor, start: Tensor, like: Tensor) -> Tensor:
    """From `start` to the solution of `M a = right`, both `[r * I, O]`, in the shape of `like` `[r, O, I]`.

    In this form a step does not raise the error even if the matrix that is factorised is `M + t I`.
    """
    step = torch.cholesky_solve(right - system @ start, cholesky(system))
    rank, out_blocks, in_blocks = like.shape
    return step.T.reshape(out_blocks, rank, in_blocks).transpose(0, 1)


def _costs_less_by_rows(quadratic: Quadratic, rank: int, mask: Tensor | None) -> bool:
    """Whether a factorisation for each block row takes fewer multiplications than the conjugate gradients."""
    out_blocks, block_out, in_blocks, block_in = quadratic.g.shape
    squared = (in_blocks * block_in) ** 2
    forming = 0 if quadratic.separable else min(_slices_cost(quadratic, rank), out_blocks * rank**2 * squared)
    sizes = [rank * in_blocks] * out_blocks if mask is None else (rank * mask.sum(1)).tolist()
    return forming + sum(size**3 for size in sizes) / 6 < ITERATIONS * out_blocks * block_out * squared


def _slices_cost(quadratic: Quadratic, rank: int) -> float:
    _, block_out, in_blocks, block_in = quadratic.g.shape
    size = (rank * in_blocks) ** 2
    return block_out * rank * (in_blocks * block_in) ** 2 if block_out * size <= ENTRIES else math.inf


def _solve_rows(quadratic: Quadratic, basis: Tensor, right: Tensor, start: Tensor, mask: Tensor | None) -> Tensor:
    rank, out_blocks, in_blocks = start.shape
    solved = _rows(start).clone()
    alive_unknowns = [] if mask is None else [row.nonzero()[:, 0] for row in mask.repeat(1, rank)]
    for j, (system, h) in enumerate(zip(_row_systems(quadratic, basis), _rows(right), strict=True)):
        alive = slice(None) if mask is None else alive_unknowns[j]
        system, h, a = system[alive][:, alive], h[alive], solved[j, alive]
        if len(h):
            solved[j, alive] = a + torch.cholesky_solve((h - system @ a)[:, None], cholesky(system))[:, 0]
    return solved.view(out_blocks, rank, in_blocks).transpose(0, 1)


def _row_systems(quadratic: Quadratic, basis: Tensor) -> Iterator[Tensor]:
    """M_j of each block row, `[r * I, r * I]`."""
    rank, in_blocks = len(basis), len(quadratic.c)
    size = rank * in_blocks
    if quadratic.separable:
        yield from repeat(shared_system(quadratic, basis), len(quadratic.d))
    elif _slices_cost(quadratic, rank) > len(quadratic.d) * rank**2 * quadratic.c[0, 0].numel() ** 2:
        yield from (shared_system(quadratic, basis, weights) for weights in quadratic.within)
    else:
        slices = torch.stack([_slice(quadratic.c, basis[:, k]).flatten() for k in range(basis.shape[1])])
        yield from ((weights @ slices).view(size, size) for weights in quadratic.within)


def _slice(c: Tensor, rows: Tensor) -> Tensor:
    """What one row k of the blocks adds to M: `B_i[k,:] C[l,:,l',:] B_i'[k,:]^T`, `[r, I, r, I]`; rows: `[r, bi]`."""
    half = torch.einsum("lmpn,qn->lmqp", c, rows)
    return torch.einsum("rm,lmqp->rlqp", rows, half)


def _conjugate_gradients(
    quadratic: Quadratic, basis: Tensor, right: Tensor, start: Tensor, mask: Tensor | None
) -> Tensor:
    """All block rows at once, each with its own step lengths."""
    factor = cholesky(shared_system(quadratic, basis))

    def product(a: Tensor) -> Tensor:  # M_j a_j, through W C
        weight = torch.einsum("rjl,rkm->jklm", a, basis)
        times_c = weight.flatten(0, 1).flatten(1) @ quadratic.c.flatten(0, 1).flatten(1)
        return masked(_by_a(quadratic, basis, times_c.view_as(weight)))

    def preconditioned(residual: Tensor) -> Tensor:
        rank, out_blocks, in_blocks = residual.shape
        solved = torch.cholesky_solve(_rows(residual).T, factor).T
        return masked(solved.reshape(out_blocks, rank, in_blocks).transpose(0, 1))

    def masked(a: Tensor) -> Tensor:
        return a if mask is None else a * mask

    a, residual = start, masked(right) - product(start)
    direction = z = preconditioned(residual)
    energy = first = (residual * z).sum((0, 2), keepdim=True)  # [1, O, 1]
    tiny = torch.finfo(energy.dtype).tiny
    for _ in range(ITERATIONS):
        if bool((energy <= TOLERANCE * first).all()):
            break
        image = product(direction)
        length = energy / (direction * image).sum((0, 2), keepdim=True).clamp_min(tiny)
        a, residual = a + length * direction, residual - length * image
        z = preconditioned(residual)
        energy, last = (residual * z).sum((0, 2), keepdim=True), energy
        direction = z + energy / last.clamp_min(tiny) * direction
    return a
