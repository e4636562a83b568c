"""What a value in a config may be: checks that its fields share. Each returns the value in its normal form."""

import math
import re
from typing import Any

from kron_hf.escaping import shown

__all__ = [
    "BlockSize",
    "checked_block_size",
    "checked_block_sizes",
    "checked_indices",
    "checked_list",
    "checked_names",
    "checked_number",
    "checked_pattern",
    "checked_rank",
    "checked_share",
    "is_int",
]

BlockSize = int | tuple[int, int]
LIMIT = 2**62  # larger numbers would only make long errors


def checked_block_size(name: str, value: Any) -> BlockSize:
    """A positive int, or a pair of positive ints or -1, the whole dimension.

    Raises:
        ValueError: It is neither; calls it `name`, as all these checks.
    """
    sizes = (value,) if isinstance(value, int) else value
    pair = not isinstance(value, int)
    if not isinstance(sizes, tuple | list) or (pair and len(sizes) != 2) or not all(map(is_int, sizes)):
        raise ValueError(f"{name} must be a positive int or a pair (out, in) of ints, got {shown(value)}")
    if any(size < 1 and not (pair and size == -1) for size in sizes):
        raise ValueError(
            f"{name} must be a positive int or a pair of positive ints (-1 in a pair = the whole dimension), "
            f"got {shown(value)}"
        )
    return (sizes[0], sizes[-1]) if pair else value


def checked_block_sizes(name: str, value: Any, most: int) -> list[BlockSize]:
    """A list of 1 to `most` block sizes; only what is nested in it is a pair."""
    return [checked_block_size(f"{name}[{index}]", size) for index, size in enumerate(checked_list(name, value, most))]


def checked_list(name: str, value: Any, most: int) -> list[Any]:
    """A list of 1 to `most` entries, and no tuple: one of two ints could be a rectangle as well as two squares."""
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise ValueError(f"{name} must be None or a list of 1 to {most} entries, got {shown(value)}")
    return value


def checked_rank(name: str, value: Any, block_size: BlockSize | None = None) -> int:
    """An int of at least 1, and at most `bo * bi` if the block size is given and closed."""
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {shown(value)}")
    if value >= LIMIT:
        raise ValueError(f"{name} must be at most 2**62 - 1, got {shown(value)}")
    if block_size is not None:
        block_out, block_in = (block_size, block_size) if isinstance(block_size, int) else block_size
        if block_out > 0 and block_in > 0 and value > block_out * block_in:
            raise ValueError(f"{name} must be at most bo * bi = {block_out * block_in}, got {shown(value)}")
    return value


def checked_share(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a share in (0, 1], got {shown(value)}")
    return float(value)


def checked_number(name: str, value: Any, below: float = math.inf) -> float:
    """A number of at least 0, below the bound."""
    if not _is_number(value) or not 0 <= value < below:
        bound = "finite number that is not negative" if below == math.inf else f"number in [0, {below:g})"
        raise ValueError(f"{name} must be a {bound}, got {shown(value)}")
    return float(value)


def checked_pattern(name: str, value: Any, regex: bool) -> dict[str, Any]:
    """A dict by names; with `regex` each must compile."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict with module names as keys, got {shown(value)}")
    for key in value if regex else ():
        _check_regex(name, key)
    return value


def checked_names(name: str, value: Any, regex: bool) -> list[str] | str | None:
    """A list of names, or a string; with `regex` that must compile."""
    if value is None:
        return None
    if isinstance(value, str):
        if regex:
            _check_regex(name, value)
        return value
    # A set's own order changes from run to run.
    names = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    if not isinstance(names, list | tuple) or not all(isinstance(item, str) for item in names):
        raise ValueError(f"{name} must be None, a list of module names or a string, got {shown(value)}")
    return list(names)


def checked_indices(value: Any) -> list[int] | int | None:
    """An index, or a list of them: `layers_to_transform`."""
    indices = list(value) if isinstance(value, list | tuple | range) else value
    listed = indices if isinstance(indices, list) else [indices]
    if indices is not None and not all(is_int(index) and index >= 0 for index in listed):
        raise ValueError(f"layers_to_transform must be None, an index or a list of indices, got {shown(value)}")
    return indices


def is_int(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {shown(value)} is no valid regular expression ({error})") from None
