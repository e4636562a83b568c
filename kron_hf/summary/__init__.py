"""What a model costs: parameters, nonzeros, sparsity and FLOPs, by one meter for Kronecker and for dense layers."""

from kron_hf.summary.blocks import block_summary
from kron_hf.summary.kron import kron_summary
from kron_hf.summary.model_flops import ModelFlops, model_flops
from kron_hf.summary.table import KronSummary, LayerSummary

__all__ = ["KronSummary", "LayerSummary", "ModelFlops", "block_summary", "kron_summary", "model_flops"]
