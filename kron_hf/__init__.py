"""Kronecker-sparse layers for Hugging Face models.

Importing this package also teaches `from_pretrained` to load models with Kronecker layers, and PEFT to take a
`KronConfig`.
"""

from typing import TYPE_CHECKING, Any

from kron_hf import versions  # noqa: F401  # raises before an unsupported library is imported

# isort: split
import kron_hf.peft_tuner  # noqa: F401  # registers the PEFT method
from kron_hf.block_size_callback import BlockSizeCallback
from kron_hf.calibration_config import CalibrationConfig
from kron_hf.callbacks import SparsityCallback
from kron_hf.config import KronConfig
from kron_hf.conv_layer import KronConv2d
from kron_hf.conversion import Calibration, calibrate
from kron_hf.deploy.exporting import export
from kron_hf.distillation import DistillationConfig, DistillationLoss
from kron_hf.hub import push_to_hub
from kron_hf.inference import fold_for_inference
from kron_hf.layers import KronLinear
from kron_hf.model import get_kron_model
from kron_hf.model_card import ModelCardCallback, measure_latency, write_model_card
from kron_hf.param_groups import kron_param_groups
from kron_hf.prepared import preprocess_kron
from kron_hf.sparsity import Sparsifier, copy_masks
from kron_hf.summary import block_summary, kron_summary, model_flops
from kron_hf.surgery import to_dense
from kron_hf.trainer.last_checkpoint import last_checkpoint

if TYPE_CHECKING:
    from kron_hf.trainer.kron_trainer import KronTrainer

__all__ = [
    "BlockSizeCallback",
    "Calibration",
    "CalibrationConfig",
    "DistillationConfig",
    "DistillationLoss",
    "KronConfig",
    "KronConv2d",
    "KronLinear",
    "KronTrainer",
    "ModelCardCallback",
    "Sparsifier",
    "SparsityCallback",
    "block_summary",
    "calibrate",
    "copy_masks",
    "export",
    "fold_for_inference",
    "get_kron_model",
    "kron_param_groups",
    "kron_summary",
    "last_checkpoint",
    "measure_latency",
    "model_flops",
    "preprocess_kron",
    "push_to_hub",
    "to_dense",
    "write_model_card",
]


def __getattr__(name: str) -> Any:
    # transformers.Trainer imports datasets, which most uses of this package do not need.
    if name == "KronTrainer":
        from kron_hf.trainer.kron_trainer import KronTrainer

        return KronTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
