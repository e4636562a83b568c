"""The operator `y = x W^T + bias` for Kronecker-sparse W, computed from the factors."""

from kron_hf.ops import flops as _flops  # noqa: F401  # registers the formulas
from kron_hf.ops.operator import kron_linear

__all__ = ["kron_linear"]
