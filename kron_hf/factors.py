"""The mathematics of Kronecker-sparse weights, in plain PyTorch.

`W = sum_i (S * A_i) (x) B_i` (Zhu, Zuo, Khalili, TMLR 2025, arXiv 2503.21928, eq. 2), with
`block_size = (bo, bi)`, `O = out_features / bo`, `I = in_features / bi`:
`W[j*bo + k, l*bi + m] = sum_i s[j, l] * a[i, j, l] * b[i, k, m]`.

The weight of a convolution is `[out, in, kh, kw]`, its blocks are of channels and B_i is `[bo, bi, kh, kw]`: as a
matrix with `in * kh * kw` columns it is a Kronecker-sparse weight with blocks of `bo x (bi * kh * kw)`.
"""

from math import prod
from typing import Any, cast

import torch
from torch import Tensor

__all__ = [
    "balanced_std",
    "block_norms",
    "kron_flops",
    "kron_sum",
    "kron_weight",
    "nearest_kronecker",
    "to_blocks",
]


def kron_weight(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Builds the dense weight `W = sum_i (s * a_i) (x) b_i`: the naive formula every faster path is tested against.

    Args:
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi]`, or `[rank, bo, bi, kh, kw]`.

    Returns:
        `[O * bo, I * bi]`, or `[O * bo, I * bi, kh, kw]`.
    """
    return kron_sum(s * a, b)


def kron_sum(m: Tensor, b: Tensor) -> Tensor:
    """`sum_i m_i (x) b_i`, as `kron_weight` for S inside of m `[rank, O, I]`."""
    (_, out_blocks, in_blocks), (_, block_out, block_in, *kernel) = m.shape, b.shape
    blocks = m.flatten(1).T @ b.flatten(1)  # [O * I, bo * bi * kh * kw]
    blocks = blocks.view(out_blocks, in_blocks, block_out, block_in, *kernel)
    return blocks.transpose(1, 2).reshape(out_blocks * block_out, in_blocks * block_in, *kernel)


def to_blocks(weight: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Rearranges a weight `[out, in]` into its blocks, one a row: `[O * I, bo * bi]` (Van Loan-Pitsianis).

    That of a convolution, `[out, in, kh, kw]`, becomes `[O * I, bo * bi * kh * kw]`.
    """
    block_out, block_in = block_size
    out_features, in_features, *kernel = weight.shape
    blocks = weight.reshape(out_features // block_out, block_out, in_features // block_in, block_in, *kernel)
    return blocks.transpose(1, 2).reshape(-1, block_out * block_in * prod(kernel))


def nearest_kronecker(weight: Tensor, block_size: tuple[int, int], rank: int) -> tuple[Tensor, Tensor, float]:
    """Best fit of `weight` by `sum_i a_i (x) b_i` in the Frobenius norm (Van Loan and Pitsianis, 1993).

    The fit is exact when `rank` reaches the rank of the rearranged weight, at the latest at
    `min(O * I, bo * bi)`, for a convolution `min(O * I, bo * bi * kh * kw)` (Proposition 1 of the paper). The singular
    values are shared equally between a and b.

    Args:
        weight: `[out_features, in_features]`, or `[out_channels, in_channels, kh, kw]`, floating point and finite.
        block_size: `(bo, bi)`, dividing the first two sizes of `weight`.
        rank: Number of terms.

    Returns:
        a `[rank, O, I]`, b `[rank, bo, bi]` (or `[rank, bo, bi, kh, kw]`) in the dtype of `weight`, and the retained
        energy `1 - ||W - What||_F^2 / ||W||_F^2` in [0, 1]. Terms beyond the exact rank contribute zero (their b is
        zero, their a is not, so that they still receive gradients).
    """
    block_out, block_in = block_size
    out_features, in_features, *kernel = weight.shape
    out_blocks, in_blocks = out_features // block_out, in_features // block_in
    rows = to_blocks(weight, block_size)
    rows = rows.double() if weight.dtype == torch.float64 else rows.float()
    u, values, vh = cast(tuple[Tensor, Tensor, Tensor], _svd(rows))
    # Terms below the numerical rank carry rounding errors only: too small to fit anything, or to be trained.
    rounding = float(values[0]) * torch.finfo(rows.dtype).eps * max(rows.shape)
    kept = min(rank, int((values > rounding).sum()))
    root = values[:kept].sqrt()
    std = balanced_std(rank, float(rows.var(correction=0)) or 1 / (3 * weight[0].numel()))
    a = torch.randn(rank, out_blocks * in_blocks, dtype=rows.dtype, device=rows.device) * std
    b = rows.new_zeros(rank, rows.shape[1])
    a[:kept] = (u[:, :kept] * root).T
    b[:kept] = root[:, None] * vh[:kept]
    energy = float(values.square().sum())
    retained = float(values[:kept].square().sum()) / energy if energy > 0 else 1.0
    a = a.view(rank, out_blocks, in_blocks).to(weight.dtype)
    return a, b.view(rank, block_out, block_in, *kernel).to(weight.dtype), retained


def _svd(matrix: Tensor) -> Any:
    return torch.linalg.svd(matrix, full_matrices=False)  # pyright: ignore


def block_norms(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of every block of W: `|s_jl| * || sum_i a_i,jl B_i ||_F`, without building W.

    Uses the Gram matrix of the B_i, so it is invariant to rescaling S against A or A against B.

    Returns:
        `[O, I]`, in float64: the ranking of blocks decides masks and must not depend on rounding more than needed.
    """
    a, b = a.double(), b.double().flatten(1)
    gram = b @ b.T  # [rank, rank]
    squared = torch.einsum("rji,rq,qji->ji", a, gram, a)
    return s.double().abs() * squared.clamp_min(0).sqrt()


def balanced_std(rank: int, variance: float) -> float:
    """Standard deviation of A and B that gives the entries of W the wanted variance when S is one.

    `Var(W) = rank * Var(A) * Var(B)`, split equally: `std(A) = std(B) = (variance / rank) ** (1/4)`.
    """
    return (variance / rank) ** 0.25


def kron_flops(
    out_features: int,
    in_features: int,
    block_size: tuple[int, int],
    rank: int,
    *,
    kernel_entries: int = 1,
    input_positions: int = 1,
) -> int:
    """Forward FLOPs per token of the factored product, one multiply-add = 2 FLOPs (dense is `2 * in * out`).

    The cheaper of the two orders (paper, Propositions 2-3): B first, `2r (in * bo + out * I)`, or A first,
    `2r (in * O + out * bi)`. Of a convolution this is per position of its output: the products with B are `kh * kw`
    times as many, and those with A, where A is first, are for every position of its input.

    Args:
        out_features: Or output channels.
        in_features: Or input channels.
        block_size: `(bo, bi)`.
        rank: Number of Kronecker terms.
        kernel_entries: `kh * kw` of a convolution.
        input_positions: Positions of a convolution's input for one of its output: the product of its strides.
    """
    block_out, block_in = block_size
    b_first = kernel_entries * in_features * block_out + out_features * (in_features // block_in)
    a_first = input_positions * in_features * (out_features // block_out) + kernel_entries * out_features * block_in
    return 2 * rank * min(b_first, a_first)
