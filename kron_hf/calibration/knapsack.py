"""The multiple-choice knapsack: one option of every layer, the least loss within a budget.

Lagrange's bound gives a choice that is the best of its own cost; what is left of the budget is then spent on single
layers.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

import torch
from torch import Tensor

__all__ = ["Choices", "cheapest_cost", "least_loss"]


@dataclass(frozen=True)
class Choices:
    """The options of one layer.

    Attributes:
        indices: What the caller calls them.
        costs: Whole numbers, growing.
        losses: Falling, in float64.
    """

    indices: Tensor
    costs: Tensor
    losses: Tensor


@dataclass(frozen=True)
class _Point:
    """A position in every layer's choices, with its cost and loss."""

    positions: Tensor
    cost: int
    loss: float


def cheapest_cost(layers: list[Choices]) -> int:
    """The cost of the cheapest choices."""
    return sum(int(layer.costs[0]) for layer in layers)


def least_loss(layers: list[Choices], budget: int) -> list[int]:
    """The chosen `indices`, with a cost of at most the budget, which must be no less than `cheapest_cost`.

    Not always the least loss, but above it by less than the gain of one step that did not fit, which with many layers
    is little. The loss never grows with the budget, and equal input gives the same choice.
    """
    table = _Table(layers)
    below, above, price = table.supported(budget)
    best = below
    for start in (below, above):
        limit = budget
        # Spending less can give more, as a large step then leaves its place to two small ones: down to where Lagrange's
        # bound forbids it, whatever a smaller budget would give is considered.
        while limit > below.cost and below.loss - price * (limit - below.cost) < best.loss:
            if (point := table.within(start, limit)) is None:
                break
            best = point if point.loss < best.loss else best
            limit = point.cost - 1
    return [int(layer.indices[position]) for layer, position in zip(layers, best.positions, strict=True)]


class _Table:
    """All choices in one table, so that a choice in all layers at once is one operation."""

    def __init__(self, layers: list[Choices]) -> None:
        self.layers = layers
        self.last = torch.tensor([len(layer.costs) - 1 for layer in layers])
        width = int(self.last.max()) + 1
        # Filled up with a layer's last option, which comes after itself and so is never taken for it.
        columns = torch.arange(width).expand(len(layers), width).minimum(self.last[:, None])  # [layers, width]
        starts = torch.cat([self.last.new_zeros(1), (self.last + 1).cumsum(0)[:-1]])
        places = starts[:, None] + columns
        self.costs = torch.cat([layer.costs for layer in layers])[places]
        self.losses = torch.cat([layer.losses for layer in layers])[places]

    def supported(self, budget: int) -> tuple[_Point, _Point, float]:
        """The points below and above the budget that are the best of their costs, and the price of a unit of cost.

        At the price p both have the same, least `loss + p * cost`: no choice has less loss than
        `below.loss - p * (cost - below.cost)`. If the best of all is within the budget it is both.
        """
        below, above = self._point(torch.zeros_like(self.last)), self._point(self.last)
        if above.cost <= budget:
            return above, above, 0.0
        while True:
            price = (below.loss - above.loss) / (above.cost - below.cost)
            point = self._point((self.losses + price * self.costs.double()).argmin(1))
            between = below.cost < point.cost < above.cost
            if not between or point.loss + price * point.cost >= below.loss + price * below.cost:
                return below, above, price
            below, above = (point, above) if point.cost <= budget else (below, point)

    def within(self, start: _Point, budget: int) -> _Point | None:
        """The point after the cheapening of one layer that loses least, if the start needs it, then `filled`.

        None if one layer is not enough. Any smaller budget that the point meets gives the same one.
        """
        if (excess := start.cost - budget) > 0:
            allowed = self.costs.gather(1, start.positions[:, None]) - excess
            places = (self.costs <= allowed).sum(1) - 1  # [layers], -1 where a layer cannot save so much
            losses = self.losses.gather(1, torch.stack([places.clamp_min(0), start.positions], 1))
            loss = torch.where(places >= 0, losses[:, 0] - losses[:, 1], torch.inf)
            layer = int(loss.argmin())
            if places[layer] < 0:
                return None
            start = self._point(start.positions.index_fill(0, torch.tensor([layer]), int(places[layer])))
        return self.filled(start, budget)

    def filled(self, base: _Point, budget: int) -> _Point:
        """The point after single steps, each time the one that gains most for its cost, until nothing fits."""
        positions, left = base.positions.tolist(), budget - base.cost
        heap = [step for layer in self._improvable(base, left) if (step := self._best_step(layer, positions, left))]
        heapify(heap)
        while heap:
            _, layer, position = heap[0]
            cost = int(self.costs[layer, position] - self.costs[layer, positions[layer]])
            if cost <= left:
                positions[layer], left = position, left - cost
            # Else what is left has shrunk since this step was found.
            if step := self._best_step(layer, positions, left):
                heapreplace(heap, step)
            else:
                heappop(heap)
        return self._point(torch.tensor(positions))

    def _improvable(self, base: _Point, left: int) -> list[int]:
        following = (base.positions + 1).minimum(self.last)
        rows = torch.arange(len(self.layers))
        step = self.costs[rows, following] - self.costs[rows, base.positions]
        return ((step > 0) & (step <= left)).nonzero().flatten().tolist()

    def _best_step(self, layer: int, positions: list[int], left: int) -> tuple[float, int, int] | None:
        """The negative gain per cost, the layer, and the position to which it leads; None if nothing fits."""
        choices, start = self.layers[layer], positions[layer]
        end = int(torch.searchsorted(choices.costs, int(choices.costs[start]) + left, right=True))
        if end == start + 1:
            return None
        steps = choices.costs[start + 1 : end] - choices.costs[start]
        gains = (choices.losses[start] - choices.losses[start + 1 : end]) / steps
        best = int(gains.argmax())
        return -float(gains[best]), layer, start + 1 + best

    def _point(self, positions: Tensor) -> _Point:
        at = positions[:, None]
        return _Point(positions, int(self.costs.gather(1, at).sum()), float(self.losses.gather(1, at).sum()))
