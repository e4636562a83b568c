"""The operator `y = x W^T + bias` for Kronecker-sparse W, computed from the factors."""

import torch.nn.functional as F
from torch import Tensor

from kron_hf.factors import kron_weight

__all__ = ["kron_linear"]


def kron_linear(x: Tensor, s: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x W^T + bias`."""
    return F.linear(x, kron_weight(s, a, b), bias)
