"""Training to block sparsity, in plain torch.

`Sparsifier` runs one of two methods, `target_ramp` or `proximal`, then freezes the masks; `pruning` says which blocks.
"""

from kron_hf.sparsity.groups import empty_columns, empty_rows
from kron_hf.sparsity.masks import copy_masks
from kron_hf.sparsity.options import SparsityOptions
from kron_hf.sparsity.sparsifier import Sparsifier

__all__ = ["Sparsifier", "SparsityOptions", "copy_masks", "empty_columns", "empty_rows"]
