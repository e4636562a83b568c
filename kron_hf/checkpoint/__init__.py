"""Full checkpoints: plain transformers models with Kronecker layers that `from_pretrained` loads.

`hook` is the extension point of transformers; `tensor_names` are those that Trainer looks for; `files`, `claims`,
`reading` and `cache` check what a stranger's files say before anything is built from them.
"""

from kron_hf.checkpoint.hook import (
    KronCheckpointConfig,
    attach_kron_config,
    carry_trained_mark,
    detach_kron_config,
    holds_trained_weights,
    mark_trained,
    strip_kron_config,
)
from kron_hf.checkpoint.tensor_names import tensor_names_kept

__all__ = [
    "KronCheckpointConfig",
    "attach_kron_config",
    "carry_trained_mark",
    "detach_kron_config",
    "holds_trained_weights",
    "mark_trained",
    "strip_kron_config",
    "tensor_names_kept",
]
