"""The table of the text encoder's conversions.

python -m examples.conversion.text_report
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

from examples.conversion.report import spread
from examples.conversion.text import RESULTS, TextConversion

__all__ = ["main", "table"]

MEASURES = ("kept", "refit", "agreement", "feature_error", "strange_feature_error")
HEADER = ["method", "params", "FLOPs", "kept", "refit", "quips: agreement", "feature error", "of quips", "s", "seeds"]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for all seeds of a conversion, in Markdown; the dense model first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_conversion(row).name, []).append(row)
    dense = [f"{rows[0]['dense'][key]:.3f}" for key in MEASURES]
    lines = [HEADER, ["---"] * len(HEADER), ["dense", "1", "1", *dense, "", ""]]
    for name, group in groups.items():
        sizes = [f"{mean(row[key] for row in group):.3f}" for key in ("params_of_dense", "flops_of_dense")]
        measures = [spread([row[key] for row in group]) for key in MEASURES]
        lines.append([name, *sizes, *measures, f"{mean(row['seconds'] for row in group):.0f}", str(len(group))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _conversion(row: dict[str, Any]) -> TextConversion:
    values = {field.name: row[field.name] for field in fields(TextConversion)}
    values["menu"] = values["menu"] and tuple(tuple(shape) for shape in values["menu"])
    return TextConversion(**values)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(table([json.loads(line) for line in options.results.open()]))


if __name__ == "__main__":
    main()
