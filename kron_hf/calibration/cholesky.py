"""Cholesky factors of covariances, which may be singular: fewer rows than features, dead inputs, all-equal images."""

import torch
from torch import Tensor

__all__ = ["cholesky", "ridged"]


def ridged(c: Tensor, ridge: float) -> Tensor:
    """`C + ridge * mean(diag C) * I`."""
    return c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of `M + t I` with the smallest t that works: zero where M is positive definite in its dtype.

    Where it is zero as a whole: of I.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    scale = float(matrix.diagonal().mean())
    for power in range(-14, 1):
        factor, info = torch.linalg.cholesky_ex(matrix + 10.0**power * scale * unit)
        if int(info) == 0:
            return factor
    return unit
