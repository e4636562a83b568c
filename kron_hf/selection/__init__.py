"""Choosing block size and rank in one training: several candidates a layer, until one is left."""

from kron_hf.selection.candidates import KronCandidates

__all__ = ["KronCandidates"]
