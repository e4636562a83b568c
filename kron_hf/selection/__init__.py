"""Choosing block size and rank in one training: several candidates a layer, until one is left.

`KronCandidates` is the layer; `BlockSizeSelector` runs one of two methods, `validation` or `penalty`, on a model's.
"""

from kron_hf.selection.candidates import KronCandidates
from kron_hf.selection.groups import replace_by_chosen
from kron_hf.selection.options import SelectionOptions
from kron_hf.selection.result import SelectionResult
from kron_hf.selection.selector import BlockSizeSelector

__all__ = ["BlockSizeSelector", "KronCandidates", "SelectionOptions", "SelectionResult", "replace_by_chosen"]
