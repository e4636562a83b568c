"""Prints what was measured as tables, checks the bars of the whole grid, and draws the plots.

python -m examples.benchmarks.report --plots examples/results
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean, quantiles
from typing import Any

from examples.benchmarks.cases import Case, Conditions
from examples.benchmarks.methods import METHODS
from examples.benchmarks.plots import draw_over_sizes, draw_roofline
from examples.benchmarks.registry import CHOICES, CONVOLUTIONS, GRID, LIMITS, WORST, limit
from examples.benchmarks.run import RESULTS, read_rows

__all__ = ["choice_lines", "grid_line", "main", "table"]

MEAN = 0.95  # of the grid
NEAR = 1.15  # of the best way
SHARED = ("machine", "device", "dtype", "threads", "tokens", "batch")

Rows = list[dict[str, Any]]


def over_dense(row: Mapping[str, Any], what: str) -> float | None:
    """A figure over dense's; None where one of them was not measured."""
    value, dense = row.get(what), row.get(f"dense_{what}")
    return value / dense if value and dense else None


def table(rows: Rows) -> Iterator[str]:
    """A line for each row; times (both: forward + backward), memory and optimizer state are ratios over dense."""
    yield "| where | method | block, rank | forward | both | step | images/s | saved | peak | optimizer | |"
    yield "|---" * 11 + "|"
    for row in rows:
        case = Case.from_row(row)
        size = "" if case.block_size is None else f"{case.block_size[0]} x {case.block_size[1]}, {case.rank}"
        size += f", {case.sparsity:.0%} zero" if case.sparsity else ""
        ratios = [over_dense(row, what) for what in ("forward_ms", "both_ms", "step_ms")]
        bytes_ = [over_dense(row, f"{what}_bytes") for what in ("saved", "peak", "optimizer")]
        images = f"{1e3 * row['batch'] / row['step_ms']:.1f}" if not case.features and row.get("step_ms") else ""
        bound = limit(case, Conditions.from_row(row))
        measured = ratios[1] if case.features else ratios[2]
        note = "" if bound is None else f"limit {bound}" + ("" if measured is None or measured <= bound else ": missed")
        cells = [case.place, METHODS[case.method].label, size, *map(_cell, ratios), images, *map(_cell, bytes_)]
        yield f"| {' | '.join([*cells, row.get('error', note)])} |"


def grid_line(rows: Rows, smallest: int = 0) -> str | None:
    """Geometric mean and 95th percentile of the grid from so many features on; None without rows."""
    cases = {case for case in GRID if case.features and case.features[0] >= smallest}
    ratios = [ratio for row in rows if Case.from_row(row) in cases and (ratio := over_dense(row, "both_ms"))]
    if len(ratios) < 2:
        return None
    mean, high = geometric_mean(ratios), quantiles(ratios, n=20, method="inclusive")[-1]
    where = f"grid from {smallest} features on" if smallest else "grid"
    return (
        f"{where}, {len(ratios)} of {len(cases)} cases, forward + backward over dense: geometric mean {mean:.3f} (at "
        f"most {MEAN}), 95th percentile {high:.3f} (at most {WORST}), largest {max(ratios):.3f}"
    )


def choice_lines(rows: Rows, declared: Iterable[Case]) -> Iterator[str]:
    """How far the chosen way is from the best of all, and where it is further than it may be."""
    cases, found = set(declared), defaultdict(dict)
    for row in rows:
        case = Case.from_row(row)
        ratio = over_dense(row, "both_ms")
        if case in cases and ratio is not None:
            found[case.place, case.block_size, case.rank][case.method] = ratio
    whole = {where: ways for where, ways in found.items() if "kron" in ways and len(ways) > 2}
    losses = {where: ways["kron"] / min(ways.values()) for where, ways in whole.items()}
    if not losses:
        return
    far = {where: loss for where, loss in losses.items() if loss > NEAR}
    yield (
        f"choice, {len(losses)} shapes: the chosen way takes {geometric_mean(losses.values()):.3f} (geometric mean) of "
        f"the best one's time; more than {NEAR} in {len(far)}"
    )
    for (place, block, rank), loss in sorted(far.items(), key=lambda item: -item[1]):
        ways = found[place, block, rank]
        best = min(ways, key=lambda name: ways[name])
        yield f"  {place}, blocks {block}, rank {rank}: {loss:.2f} of {METHODS[best].label}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw there")
    options = parser.parse_args()
    rows = read_rows(options.input)
    for shared, own in _grouped(row for row in rows if "roof" not in row):
        roofs = [row["roof"] for row in rows if "roof" in row and _shared(row)[:4] == shared[:4]]
        machine, device, dtype, threads, tokens, batch = shared
        sizes = f"tokens of a layer: {tokens}, images of others: {batch}"
        print(f"\n{machine}, {device}, {dtype}, threads: {threads}, {sizes}, torch {_torch(own)}\n")
        summed_up = set(CHOICES + GRID) - set(LIMITS)
        lines = table([row for row in own if Case.from_row(row) not in summed_up])
        sys.stdout.writelines(f"{line}\n" for line in lines)
        grids = [line for line in (grid_line(own), grid_line(own, smallest=384)) if line] or ["grid: nothing measured"]
        choices = [line for declared in (CHOICES, CONVOLUTIONS) for line in choice_lines(own, declared)]
        sys.stdout.writelines(f"{line}\n" for line in (*grids, *choices))
        if options.plots:
            name = f"{device}_{dtype}_{threads}_{tokens}"
            draw_over_sizes(own, options.plots / f"speed_{name}.png")
            if roofs:
                draw_roofline(own, roofs[-1], options.plots / f"roofline_{name}.png")


def _torch(rows: Rows) -> str:
    return ", ".join(sorted({row["about"]["torch"] for row in rows}))


def _grouped(rows: Iterable[dict[str, Any]]) -> list[tuple[tuple[Any, ...], Rows]]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(_shared(row), []).append(row)
    return list(groups.items())


def _shared(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in SHARED)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
