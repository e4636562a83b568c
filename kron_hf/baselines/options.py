"""The options of the baselines, checked."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from kron_hf.sparsity.options import SparsityOptions

__all__ = ["Checks", "checked_choice", "checked_count", "checked_number", "schedule"]

Checks: TypeAlias = dict[str, Callable[[str, Any], Any]]  # by name of option: raises a ValueError, or returns the value


def schedule(target_sparsity: float, start: float, end: float, interval: int, scope: str = "global") -> SparsityOptions:
    """Target and schedule of a baseline.

    Raises:
        ValueError: An option is out of range.
    """
    if target_sparsity is None:
        raise ValueError("target_sparsity must be a number in [0, 1), got None")
    return SparsityOptions(target_sparsity=target_sparsity, scope=scope, start=start, end=end, interval=interval)


def checked_count(name: str, value: object) -> int:
    """A positive int.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value


def checked_number(name: str, value: object, most: float = math.inf) -> float:
    """A finite number from 0 to `most`.

    Raises:
        ValueError: It is not.
    """
    bad = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if bad or not 0 <= value <= most:  # pyright: ignore[reportOperatorIssue]
        wanted = "a finite number that is not negative" if most == math.inf else f"a number in [0, {most:g}]"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return float(value)  # pyright: ignore[reportArgumentType]


def checked_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of the choices.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value
