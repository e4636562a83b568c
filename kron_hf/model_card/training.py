"""What a card tells of a training: settings on a list, and of these only plain values.

Training arguments carry tokens, user names, paths and whatever a user put there. What is not on the list is not told,
and neither is text that could be a path.
"""

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

__all__ = ["ALLOWED", "public_settings"]

ALLOWED = (
    # transformers.TrainingArguments
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("bf16", "fp16", "tf32", "seed", "data_seed", "full_determinism", "load_best_model_at_end"),
    # KronConfig
    *("block_size", "rank", "init_weights", "target_params", "target_flops", "max_error"),
    # KronTrainer and SparsityCallback
    *("factor_lr", "mask_lr", "target_sparsity", "l1", "scope", "start", "end", "interval", "regrowth"),
    *("group_penalty", "groups"),
    # what happened
    *("steps", "epochs", "batch_size", "train_images"),
)
# A name such as `adamw_torch_fused`; no path, address, token or sentence.
WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")


def public_settings(settings: Any) -> dict[str, Any]:
    """The settings that are told, in the order of the list.

    Args:
        settings: `TrainingArguments`, another object with such attributes, a mapping, or None.
    """
    if settings is None:
        return {}
    given = settings if isinstance(settings, Mapping) else {name: getattr(settings, name, None) for name in ALLOWED}
    values = {name: _plain(given[name]) for name in ALLOWED if name in given}
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """Numbers, pairs of them, and words; None for anything else."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return list(value) if value and all(isinstance(entry, int | float) for entry in value) else None
    return value if isinstance(value, str) and WORD.fullmatch(value) else None
