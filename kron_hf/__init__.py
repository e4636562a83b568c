"""Kronecker-sparse layers for Hugging Face models.

Importing this package also teaches `from_pretrained` to load models with Kronecker layers.
"""

from kron_hf.config import KronConfig
from kron_hf.layers import KronLinear
from kron_hf.model import get_kron_model
from kron_hf.surgery import to_dense

__all__ = ["KronConfig", "KronLinear", "get_kron_model", "to_dense"]
