"""Block sparsity of dense models, the baselines to compare Kronecker layers with, and the way to Kronecker form.

`GroupLasso`, `ElasticGroupLasso`, `BlockRigL`, `IterativePruning` and `GradualPruning` are plain torch; each has a
callback for the stock `Trainer`. `block_layers` says which linears of a model they prune.
"""

from kron_hf.baselines.block_layer import BlockLayer
from kron_hf.baselines.callbacks import (
    BlockRigLCallback,
    ElasticGroupLassoCallback,
    GradualPruningCallback,
    GroupLassoCallback,
    IterativePruningCallback,
)
from kron_hf.baselines.group_lasso import ElasticGroupLasso, GroupLasso
from kron_hf.baselines.magnitude import GradualPruning, IterativePruning
from kron_hf.baselines.rigl import BlockRigL
from kron_hf.baselines.targets import block_layers, block_sparsity
from kron_hf.baselines.to_kron import to_kron

__all__ = [
    "BlockLayer",
    "BlockRigL",
    "BlockRigLCallback",
    "ElasticGroupLasso",
    "ElasticGroupLassoCallback",
    "GradualPruning",
    "GradualPruningCallback",
    "GroupLasso",
    "GroupLassoCallback",
    "IterativePruning",
    "IterativePruningCallback",
    "block_layers",
    "block_sparsity",
    "to_kron",
]
