"""What the experiments are meant to show, each checked against the rows."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from examples.experiments.cells import Cell, shown
from examples.experiments.methods import BASELINES
from examples.experiments.tables import dense_cell

__all__ = ["BARS", "Bar", "Verdict"]

Shape = tuple[tuple[int, int], int]  # block size and rank


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was measured, and whether that is enough."""

    measured: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One promise.

    Attributes:
        experiment: Whose rows tell.
        claim: In words.
        judge: Takes the cells; None where runs are missing.
    """

    experiment: str
    claim: str
    judge: Callable[[list[Cell]], Verdict | None]


def _near_dense(
    cells: list[Cell], sparsity: float, shapes: Collection[Shape], points: float, share: float = 1.0
) -> Verdict | None:
    """Loses at most so many points against dense, with at most that share of the compared layers' parameters.

    Of several shapes that have so few parameters, the validation images choose.
    """
    dense = dense_cell(cells)
    own = [
        cell
        for cell in cells
        if (cell.case.table, cell.case.column, cell.series[0]) == ("sparsity", sparsity, "Kronecker")
        and cell.series[1:] in shapes
        and cell.complete
        and _share(cell) <= share
    ]
    if dense is None or not dense.complete or not own:
        return None
    best = max(own, key=lambda cell: cell.mean("validation_accuracy"))
    difference = best.minus(dense)
    block, rank = best.series[1:]
    measured = f"{shown(difference, '+')} points, {_share(best):.1%} of the parameters ({block}, rank {rank})"
    return Verdict(measured=measured, holds=difference[0] >= -points)


def _share(cell: Cell) -> float:
    """Trained parameters of the compared layers over those of dense ones."""
    return cell.mean("converted_trained_params") / cell.mean("converted_dense_params")


def _beats_baselines(cells: list[Cell], nonzeros: float, points: float, table: str = "nonzeros") -> Verdict | None:
    """Is at least so many points above the best baseline at equal nonzeros; with 0, above it at all.

    Where Kronecker layers have several cases, the validation images choose.
    """
    own = [c for c in cells if c.case.table == table and c.case.column == nonzeros and c.complete]
    kron = [cell for cell in own if cell.candidate.method == "kron"]
    others = [cell for cell in own if cell.candidate.method != "kron"]
    if not kron or len(others) < len(BASELINES):
        return None
    best = max(others, key=lambda cell: cell.accuracy[0])
    mine = max(kron, key=lambda cell: cell.mean("validation_accuracy"))
    difference = mine.minus(best)
    holds = difference[0] >= points if points else difference[0] > 0
    return Verdict(measured=f"{shown(difference, '+')} points over {best.series[0]}", holds=holds)


BARS = (
    Bar(
        experiment="mlp_fashion_mnist",
        claim="50 % sparse, blocks 8 x 8, rank 2: within 1.3 points of dense",
        judge=lambda cells: _near_dense(cells, 0.5, [((8, 8), 2)], 1.3),
    ),
    Bar(
        experiment="mlp_fashion_mnist",
        claim="80 % sparse, blocks 4 x 4, rank 4: within 1.0 point of dense",
        judge=lambda cells: _near_dense(cells, 0.8, [((4, 4), 4)], 1.0),
    ),
    Bar(
        experiment="mlp_fashion_mnist",
        claim="at 5,000 nonzeros: at least 2.5 points above the best baseline",
        judge=lambda cells: _beats_baselines(cells, 5000, 2.5),
    ),
    Bar(
        experiment="mlp_fashion_mnist",
        claim="at 5,000 nonzeros, all with blocks of 8 x 8: at least 2.5 points above the best baseline",
        judge=lambda cells: _beats_baselines(cells, 5000, 2.5, "same_block"),
    ),
    Bar(
        experiment="lenet5_mnist",
        claim="50 % sparse, at most 20 % of the compared layers' parameters: within .5 points of dense",
        judge=lambda cells: _near_dense(cells, 0.5, [((4, 4), 2), ((4, 8), 4)], 0.5, 0.2),
    ),
    Bar(
        experiment="lenet5_mnist",
        claim="the same, all four declared shapes competing on the validation images",
        judge=lambda cells: _near_dense(cells, 0.5, [((4, 4), 2), ((4, 8), 4), ((12, 8), 4), ((4, 4), 1)], 0.5, 0.2),
    ),
    Bar(
        experiment="vit_fashion_mnist",
        claim="50 % sparse, blocks 4 x 8, rank 4: within 2 points of dense",
        judge=lambda cells: _near_dense(cells, 0.5, [((4, 8), 4)], 2.0),
    ),
    Bar(
        experiment="vit_fashion_mnist",
        claim="at as many nonzeros: above every baseline",
        judge=lambda cells: _beats_baselines(cells, 47_600, 0.0),
    ),
)
