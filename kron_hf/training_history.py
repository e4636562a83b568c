"""The curves of a training: what Trainer logged, from its state or from `trainer_state.json`."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kron_hf.bounded_json import read_bounded_json

__all__ = ["Curves", "curves_of", "read_history"]

Curves = dict[str, list[tuple[int, float]]]

STATE = "trainer_state.json"
MAX_BYTES = 2**26
MAX_CURVES, MAX_POINTS = 32, 2000
# Times and counters are logged, too, but say nothing about the model.
NO_CURVES = re.compile(r"(^|_)(runtime|samples_per_second|steps_per_second|epoch|step|flos|model_preparation_time)$")


def curves_of(history: Iterable[Any]) -> Curves:
    """The logged figures by name, each a list of `(step, value)`; what is no finite number is left out.

    Args:
        history: Trainer's `state.log_history`.
    """
    curves: Curves = {}
    for entry in history:
        step = entry.get("step") if isinstance(entry, Mapping) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            continue
        for name, value in entry.items():
            is_known = name in curves or len(curves) < MAX_CURVES
            if is_known and isinstance(name, str) and not NO_CURVES.search(name) and _is_number(value):
                curves.setdefault(name, []).append((step, float(value)))
    return {name: _thinned(points) for name, points in curves.items() if len(points) > 1}


def read_history(directory: Path) -> list[Any]:
    """The log of the training that made a model: of its folder, else of the newest checkpoint in it; [] if none.

    On the Hub the newest checkpoint may be called `last-checkpoint`.

    Raises:
        ValueError: The file is no JSON object with a list `log_history`, or too large.
    """
    folders = [directory, directory / "last-checkpoint", *_checkpoints(directory)]
    places = [folder / STATE for folder in folders]
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        return []
    content = read_bounded_json(file, MAX_BYTES)
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        raise ValueError(f"{STATE} must hold an object with a list log_history")
    return history


def _checkpoints(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,15}", path.name)]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = -(-len(points) // MAX_POINTS)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]
