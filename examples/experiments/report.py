"""Makes every table and picture from the files of results, whatever they hold by now.

python -m examples.experiments.report
"""

import argparse
from pathlib import Path

from examples.experiments.bars import BARS
from examples.experiments.cases import Experiment
from examples.experiments.cells import Cell, cells_of
from examples.experiments.plan import EXPERIMENTS
from examples.experiments.plots import draw_masks, draw_nonzeros, draw_sparsity
from examples.experiments.results import RESULTS, read_rows
from examples.experiments.tables import (
    case_table,
    conditions,
    l1_table,
    markdown,
    nonzeros_table,
    same_block_table,
    sparsity_table,
)

__all__ = ["main", "write_report"]

TABLES = {
    "sparsity": ("Test accuracy at equal block sparsity", sparsity_table),
    "nonzeros": ("Test accuracy at equal nonzeros of the compared layers", nonzeros_table),
    "same_block": ("The same with one block size for all", same_block_table),
    "l1": ("The l1 penalty: what it gives", l1_table),
}


def write_report(experiments: dict[str, Experiment], folder: Path) -> str:
    """Reads `NAME.jsonl` of each experiment, draws its pictures there, and returns the Markdown of all tables."""
    cells = {
        name: cells_of(experiment, read_rows(folder / f"{name}.jsonl")) for name, experiment in experiments.items()
    }
    parts = ["# Experiments", _bar_table(cells)]
    for name, experiment in experiments.items():
        if cells[name]:
            parts.append(f"## {name}\n\n{conditions(experiment, cells[name])}")
            parts += _tables(cells[name])
            parts.append(" ".join(f"![{path.stem}]({path.name})" for path in _pictures(name, cells[name], folder)))
    return "\n\n".join(parts) + "\n"


def _bar_table(cells: dict[str, list[Cell]]) -> str:
    lines = [["experiment", "bar", "measured", ""]]
    for bar in BARS:
        verdict = bar.judge(cells.get(bar.experiment, []))
        outcome = ["", "not run"] if verdict is None else [verdict.measured, "holds" if verdict.holds else "FAILS"]
        lines.append([bar.experiment, bar.claim, *outcome])
    return markdown(lines, text_columns=4)


def _tables(cells: list[Cell]) -> list[str]:
    found = {cell.case.table for cell in cells}
    parts = [f"### {title}\n\n{table(cells)}" for key, (title, table) in TABLES.items() if key in found]
    return [*parts, f"### All cases\n\n{case_table(cells)}"]


def _pictures(name: str, cells: list[Cell], folder: Path) -> list[Path]:
    sparse = [cell for cell in cells if cell.candidate.block_size is not None]
    masked = [row for cell in cells for row in cell.rows if row.get("masks")]
    drawn: list[Path] = []
    if sparse:
        drawn = [folder / f"{name}_{kind}.png" for kind in ("sparsity", "nonzeros")]
        draw_sparsity(cells, drawn[0])
        draw_nonzeros(cells, drawn[1])
    if masked:
        drawn.append(folder / f"{name}_masks.png")
        draw_masks(masked[0], drawn[-1])
    return drawn


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the .jsonl files")
    options = parser.parse_args()
    text = write_report(EXPERIMENTS, options.results)
    (options.results / "experiments.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
