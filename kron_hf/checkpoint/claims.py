"""What a stranger's `config.json` may claim: limits that hold before a model is built or memory is taken.

A config costs a few bytes, the model it describes may cost hours and all memory of the machine. No real model comes
near these limits.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from kron_hf.escaping import shown

__all__ = ["check_config", "check_elements"]

MAX_NESTING = 32
MAX_LAYERS = 1024
MAX_LABELS = 2**17
# Layers are built one by one, in Python; widths only set shapes on the meta device.
COUNTS_LAYERS = re.compile(r"(^|(?<!_per)_)(layers?|depths?|blocks?|stages?|iterations?)$")
# Their keys or values are names that someone chose, not settings.
NAMES = {"id2label", "label2id"}
# Tensors that the files lack (a new head, say) are allocated as large as the config claims.
MAX_GROWTH = 64
FREE_ELEMENTS = 2**26


def check_config(config: Any) -> None:
    """Refuses a config of absurdly many layers or labels, or nested too deep to be copied.

    Args:
        config: A config, or the parsed content of its file.

    Raises:
        ValueError: It claims more than any real model has; names the key and both numbers.
    """
    for key, value in _entries(config):
        limit = MAX_LABELS if key == "num_labels" else MAX_LAYERS if COUNTS_LAYERS.search(key) else None
        if limit is not None and (count := _total(key, value)) > limit:
            raise ValueError(f"config.json: {shown(key)} claims {count:.4g}, at most {limit} can be loaded")


def check_elements(tensors: Iterable[Tensor], stored: int) -> None:
    """Refuses a model that would take far more memory than its files hold.

    Args:
        tensors: Its parameters and buffers, on the meta device.
        stored: Number of elements in its files.

    Raises:
        ValueError: It has more than 64 times the elements, and more than 2**26; names both numbers.
    """
    claimed = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in tensors}.values())
    if claimed > MAX_GROWTH * stored + FREE_ELEMENTS:
        raise ValueError(
            f"config.json claims a model of {claimed:.4g} elements, but the weight files hold {stored:.4g}; more than "
            f"{MAX_GROWTH} times as many are not allocated"
        )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every setting with its value, at any depth; names of labels are none."""
    pending = [(config, 0, False)]
    while pending:
        holder, level, in_names = pending.pop()
        if level > MAX_NESTING:
            raise ValueError(f"config.json is nested deeper than {MAX_NESTING} levels")
        values = vars(holder) if isinstance(holder, PreTrainedConfig) else holder
        if isinstance(values, dict):
            if not in_names:
                yield from ((str(key), value) for key, value in values.items())
            pending += [(value, level + 1, in_names or key in NAMES) for key, value in values.items()]
        elif isinstance(values, list | tuple):
            pending += [(value, level + 1, in_names) for value in values]


def _total(key: str, value: Any) -> float:
    """How many layers a count claims; a list counts a stage each, except where it holds the indices of layers."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [max(float(min(number, 1e300)), 0.0) for number in values if isinstance(number, int | float)]
    indices = "layer" in key and not key.startswith("num_")
    return max([len(values), max(numbers, default=0.0) if indices else sum(numbers)])
