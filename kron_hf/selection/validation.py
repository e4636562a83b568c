"""Dropping by held-out loss: the candidate goes that the model misses least."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kron_hf.selection.candidate_set import CandidateSet
from kron_hf.sharding import local, reshard

__all__ = ["Validation", "left_after"]


def left_after(step: int, start_step: int, end_step: int, drops: int) -> int:
    """How many candidates are left after a step: `drops` of them go at equal distances, the last at `end_step`.

    Example:
        >>> [left_after(step, start_step=10, end_step=50, drops=2) for step in (29, 30, 49, 50)]
        [3, 2, 2, 1]
    """
    at = [start_step + round(number * (end_step - start_step) / drops) for number in range(1, drops + 1)]
    return drops + 1 - sum(step >= each for each in at)


class Validation:
    """The held-out comparisons of a training; `BlockSizeSelector` calls it.

    Args:
        candidates: The candidates of the model.
        model: The model; in eval mode while it is evaluated.
        evaluate: Gives its held-out loss; the mean over the processes counts.
        cost_weight: Loss that the dense cost of all layers is worth.
        schedule: First step, last step, and how many candidates go in between.
    """

    def __init__(
        self,
        candidates: CandidateSet,
        model: nn.Module,
        evaluate: Callable[[], float],
        cost_weight: float,
        schedule: tuple[int, int, int],
    ) -> None:
        self._set, self._model, self._evaluate, self._cost_weight = candidates, model, evaluate, cost_weight
        self._start_step, self._end_step, self._drops = schedule

    def advance(self, step: int, drop: Callable[[int, int, dict[int, float]], None]) -> None:
        """After optimizer step number `step`: if one is due, each choice drops a candidate."""
        wanted = left_after(step, self._start_step, self._end_step, self._drops)
        while self._set.drops + 1 > wanted:
            most = self._set.drops + 1  # choices with fewer candidates wait
            due = [c for c in range(len(self._set.choices)) if len(self._set.alive(c)) == most]
            at = [(choice, k) for choice in due for k in self._set.alive(choice)]
            losses = dict(zip(at, self._losses_without(at), strict=True))
            for choice in due:
                own = {k: losses[choice, k] for k in self._set.alive(choice)}
                # The loss is that of the whole model, so the cost is a share of the whole model's, too.
                scores = {
                    k: loss - self._cost_weight * self._set.cost(choice, k, of_all=True) for k, loss in own.items()
                }
                drop(choice, min(scores, key=lambda k: scores[k]), own)  # ties: the first

    def state_dict(self) -> dict[str, Any]:
        """The schedule, which counts the candidates that there were in the beginning."""
        return {"drops": self._drops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._drops = state["drops"]

    def _losses_without(self, at: list[tuple[int, int]]) -> list[float]:
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        losses: list[float] = []
        try:
            for choice, k in at:
                with self._set.without(choice, k):
                    losses.append(float(self._evaluate()))
        finally:
            reshard(self._model)
            for module, training in modes:
                module.training = training
        losses = _mean_over_processes(losses, local(next(self._model.parameters())).device)
        if not any(map(math.isfinite, losses)):
            raise ValueError(f"the held-out loss is not finite, whichever candidate is left out: {losses}")
        return [loss if math.isfinite(loss) else math.inf for loss in losses]


def _mean_over_processes(values: list[float], device: torch.device) -> list[float]:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    mean: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()
