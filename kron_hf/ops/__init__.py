"""The operator `y = x W^T + bias` for Kronecker-sparse W, computed from the factors."""

from kron_hf.ops.operator import kron_linear

__all__ = ["kron_linear"]
