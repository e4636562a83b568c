"""Distillation from a dense teacher, in plain torch.

`parts` has the formulas; `recorder` gets what they need out of a model, `teacher` out of the teacher; `loss` adds up.
"""

from kron_hf.distillation.config import DistillationConfig
from kron_hf.distillation.loss import DistillationLoss, Distilled

__all__ = ["DistillationConfig", "DistillationLoss", "Distilled"]
