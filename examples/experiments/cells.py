"""What a case came to over its seeds."""

from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from examples.experiments.cases import Candidate, Case, Experiment
from examples.experiments.results import Rows
from examples.experiments.schedule import answer

__all__ = ["Cell", "Series", "cells_of", "shown"]

Series = tuple[str, tuple[int, int] | None, int | None]  # method in words, block size, rank


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A case with the rows of its seeds.

    Attributes:
        case: What was asked.
        candidate: Whom the validation images chose.
        rows: One for each seed that has run; at least one.
        complete: Whether all seeds have run.
        searched: The best validation accuracy of each candidate in the search, one seed.
    """

    case: Case
    candidate: Candidate
    rows: tuple[dict[str, Any], ...]
    complete: bool
    searched: tuple[tuple[float, Candidate], ...] = ()

    @property
    def series(self) -> Series:
        """What it has in common with the cells of other columns; an l1 is a column of its own table."""
        options = tuple((name, value) for name, value in self.candidate.options if name != "l1")
        plain = Candidate(method=self.candidate.method, options=options).label
        l1 = ", l1" if self.case.table == "l1" else ""
        return plain + l1, self.candidate.block_size, self.candidate.rank

    def values(self, key: str) -> list[float]:
        """A figure of each seed."""
        return [row[key] for row in self.rows]

    def mean(self, key: str) -> float:
        """Its mean over the seeds."""
        return mean(self.values(key))

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of the test accuracy in percent."""
        return _mean_and_deviation([100 * value for value in self.values("test_accuracy")])

    def minus(self, other: "Cell") -> tuple[float, float]:
        """Mean and standard deviation of the differences of the same seeds, in points of test accuracy."""
        mine, theirs = ({row["seed"]: row["test_accuracy"] for row in cell.rows} for cell in (self, other))
        return _mean_and_deviation([100 * (mine[seed] - theirs[seed]) for seed in mine if seed in theirs])


def cells_of(experiment: Experiment, rows: Rows) -> list[Cell]:
    """The cases that have rows, in the order of the plan."""
    cells = []
    for case in experiment.cases:
        found = answer(experiment, case, rows)
        if found.chosen is not None and found.finals:
            cells.append(
                Cell(
                    case=case,
                    candidate=found.chosen[0],
                    rows=found.finals,
                    complete=not found.missing,
                    searched=tuple((score, run.candidate) for score, run in found.searched),
                )
            )
    return cells


def shown(figures: tuple[float, float], sign: str = "") -> str:
    """`86.43 ± 0.21`."""
    return f"{figures[0]:{sign}.2f} ± {figures[1]:.2f}"


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    return mean(values), stdev(values) if len(values) > 1 else 0.0
