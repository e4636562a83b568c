"""The tables of the conversions that have been made.

python -m examples.conversion.report
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.conversion.plan import Conversion
from examples.conversion.run import RESULTS

__all__ = ["differences", "main", "spread", "table"]

Row = dict[str, Any]
HEADER = (
    *("method", "params", "FLOPs", "refit", "kept", "photographs: refit", "kept", "feature error", "photographs"),
    *("seconds", "seeds"),
)


def table(rows: list[Row]) -> str:
    """A line for all seeds of a conversion, in Markdown; the dense model first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_name(row), []).append(row)
    first = rows[0]
    scores = [f"{first['dense']:.3f}"] * 2 + [f"{first['photograph_dense']:.3f}"] * 2
    lines = [HEADER, ["---"] * len(HEADER), ["dense", "1", "1", *scores, "0", "0", "", ""]]
    lines += [_line(name, group) for name, group in groups.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(rows: list[Row]) -> str:
    """What chosen shapes keep above low rank with the same budget and images; mean and standard error over seeds."""
    chosen, low_rank = (
        {(row["budget"], row["seed"]): row for row in rows if _is_plain(row) and (row["menu"] is None) is free}
        for free in (True, False)
    )
    keys = ("refit", "kept", "photograph_refit", "photograph_kept")
    lines = [("budget", "refit", "kept", "photographs: refit", "kept", "seeds"), ["---"] * 6]
    for budget in dict.fromkeys(budget for budget, _ in chosen):
        seeds = [seed for other, seed in chosen if other == budget and (budget, seed) in low_rank]
        pairs = [(chosen[budget, seed], low_rank[budget, seed]) for seed in seeds]
        if len(pairs) > 1:
            values = ([mine[key] - theirs[key] for mine, theirs in pairs] for key in keys)
            lines.append([f"{budget:g}", *(_signed(each) for each in values), str(len(pairs))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_plain(row: Row) -> bool:
    return row["budget"] is not None and not row["mixed"] and not row["distill_steps"]


def _signed(values: list[float]) -> str:
    return f"{mean(values):+.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def _name(row: Row) -> str:
    if row["budget"] is None:
        shape = f"{row['block_size'][0]} x {row['block_size'][1]} rank {row['rank']}"
    else:
        menu = "chosen shapes" if row["menu"] is None else "low rank, chosen ranks"
        shape = f"{menu}, {row['budget']:g}"
    extras = [" mixed images"] * row["mixed"]
    if row["images"] != Conversion().images:
        extras.append(f" {row['images']:,} images")
    if row["distill_steps"]:
        extras.append(f" {row['distill_steps']} steps of distillation at {row['learning_rate']:g}")
    return ",".join([f"{row['method']}, {shape}", *extras])


def _line(name: str, rows: list[Row]) -> list[str]:
    keys = ("refit", "kept", "photograph_refit", "photograph_kept", "feature_error", "photograph_feature_error")
    return [
        name,
        f"{mean(row['params_of_dense'] for row in rows):.3f}",
        f"{mean(row['flops_of_dense'] for row in rows):.2f}",
        *(spread([row[key] for row in rows]) for key in keys),
        f"{mean(row['seconds'] for row in rows):.0f}",
        str(len(rows)),
    ]


def spread(values: list[float]) -> str:
    """`0.715 ± 0.004`: mean and standard deviation, of several seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.open()]
    print(f"{table(rows)}\n\nChosen shapes minus low rank:\n\n{differences(rows)}")


if __name__ == "__main__":
    main()
