"""Whether autocast is on for a device, and how to do without it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp.autocast_mode import is_autocast_available

__all__ = ["autocast_enabled", "without_autocast"]


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; devices that know no autocast (meta) make torch's own question raise."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which products keep their dtype."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


@torch.compiler.assume_constant_result
def _knows_autocast(device_type: str) -> bool:
    """A constant for `torch.compile`, which cannot trace this in torch 2.11."""
    return is_autocast_available(device_type)
