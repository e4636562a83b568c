"""Reads small JSON files of strangers."""

import json
from pathlib import Path
from typing import Any

from kron_hf.escaping import one_line

__all__ = ["read_bounded_json"]


def read_bounded_json(path: Path, max_bytes: int) -> Any:
    """The value in a file of at most so many bytes.

    Raises:
        ValueError: The file is larger, or no JSON; names the file without its folder.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path.name} has {size} bytes, at most {max_bytes} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {one_line(str(error))}") from error
