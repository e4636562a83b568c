"""Files of results: one JSON object a line, one line a run, appended when the run is done."""

import json
from pathlib import Path
from typing import Any

from examples.experiments.cases import Run

__all__ = ["RESULTS", "Rows", "append_row", "read_rows"]

RESULTS = Path(__file__).parent.parent / "results"

Rows = dict[Run, dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """The rows of a file by their runs; none if there is no file. A line cut off by a kill is left out.

    Raises:
        ValueError: Another line is no row of results.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows: Rows = {}
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows[Run.from_row(row)] = row
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of results ({error!r})") from error
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a line; a line that a kill cut off before it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(row).encode() + b"\n")
