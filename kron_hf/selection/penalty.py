r"""The paper's group penalty: it shrinks every candidate's whole factor set until one is left.

After each optimizer step, with theta_k all of S, A and B of candidate k,

    theta_k <- max(1 - rate * w_k / ||theta_k||, 0) * theta_k,    w_k = u_k * (1 + cost_weight * cost_k),

the proximal map of `rate * sum_k w_k ||theta_k||`; `rate` is the paper's step size times its lambda, and grows. With
`penalty_weights="norm"` u_k is ||theta_k^0||, the norm at the start: sqrt(size_k) times the root mean square of the
entries, so that every candidate begins at the same distance from zero, whatever its size and scale. With "size" it is
the paper's sqrt(size_k), size_k being the entries of S, A and B: candidates whose entries are larger at the start,
with the usual initialisation those of larger blocks, are then further from zero and stay longer. (In
examples/experiments/block_size.py "norm" finds the block size of 15 of 15 planted teachers, "size" of 14; on
Fashion-MNIST, where the layers trained alone are best at 4 x 4, "norm" chooses that and "size" 16 x 16.)

The scale of S, A and B against each other is arbitrary: S / c, c * A is the same weight with another ||theta||. So the
norm is taken in the balanced scaling, where it is smallest (the three Frobenius norms of a layer are then equal),

    ||theta_k||^2 = sum_layers 3 * (||S|| * ||A|| * ||B||)^(2/3),

and since a common factor commutes with the rescaling, nothing has to be moved for it.

The rate grows geometrically from one that takes a hundredth of the norm over the whole selection to one that takes a
fifth of it in a step, whatever the model's scale, optimizer and learning rate: somewhere between, one candidate after
the other no longer grows back as fast as it shrinks.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from kron_hf.selection.candidate_set import CandidateSet

__all__ = ["Penalty", "group_shrinkage", "growing_rate", "shrinkages"]

FIRST_TOTAL = 0.01  # share of the norm that the first rate would take over the whole selection
LAST = 0.2  # share of it that the last rate takes in one step


def group_shrinkage(norm: float, threshold: float) -> float:
    """`max(1 - threshold / norm, 0)`, the factor of the proximal map of `threshold * ||theta||`; 0 where norm is 0."""
    return max(1 - threshold / norm, 0.0) if norm > 0 else 0.0


def growing_rate(step: int, start_step: int, end_step: int, reference: float) -> float:
    """The penalty's rate after optimizer step number `step`.

    Args:
        step: From `start_step + 1` to `end_step`.
        start_step: Steps before the selection.
        end_step: The step with which it ends.
        reference: The largest `||theta_k|| / w_k` when the selection began.
    """
    steps = end_step - start_step
    first, last = math.log(FIRST_TOTAL / steps), math.log(LAST)
    return reference * math.exp(first + (last - first) * (step - start_step) / steps)


def shrinkages(norms: Mapping[int, float], weights: Mapping[int, float], rate: float) -> dict[int, float]:
    """By which factor each candidate shrinks; 0 drops it.

    If all would become zero at once, the one that is largest relative to its weight keeps its value.
    """
    factors = {k: group_shrinkage(norm, rate * weights[k]) for k, norm in norms.items()}
    if not any(factors.values()):
        factors[max(norms, key=lambda k: norms[k] / weights[k])] = 1.0
    return factors


class Penalty:
    """The penalty of a training; `BlockSizeSelector` calls it.

    Args:
        candidates: The candidates of the model.
        by: What u_k is, "norm" or "size".
        cost_weight: By how much a candidate that costs as much as dense layers is penalised more.
        start_step: Steps before the selection.
        end_step: The step with which it ends.
    """

    def __init__(self, candidates: CandidateSet, by: str, cost_weight: float, start_step: int, end_step: int) -> None:
        self._set, self._cost_weight = candidates, cost_weight
        self._start_step, self._end_step = start_step, end_step
        self._units = candidates.norms() if by == "norm" else candidates.root_sizes()  # u_k in each choice
        self._references: list[float] = []  # of each choice

    def advance(self, step: int, drop: Callable[[int, int, dict[int, float]], None]) -> None:
        """After optimizer step number `step`: the proximal step, which may drop candidates."""
        norms = self._set.norms()
        weights = [self._weights(choice) for choice in range(len(norms))]
        if not self._references:
            self._references = [max(n[k] / w[k] for k in n) for n, w in zip(norms, weights, strict=True)]
        for choice, own in enumerate(norms):
            if len(own) == 1:
                continue
            rate = growing_rate(step, self._start_step, self._end_step, self._references[choice])
            for k, factor in shrinkages(own, weights[choice], rate).items():
                if factor == 0:
                    drop(choice, k, {})
                else:
                    self._set.scale(choice, k, factor)
        if step >= self._end_step and self._set.drops > 0:
            self._drop_the_rest(drop)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"references": self._references, "units": [[list(each) for each in own.items()] for own in self._units]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._references = list(state["references"])
        self._units = [{int(k): float(norm) for k, norm in own} for own in state["units"]]

    def _drop_the_rest(self, drop: Callable[[int, int, dict[int, float]], None]) -> None:
        warnings.warn(
            f"the penalty had left {self._set.drops + 1} candidates at the selection's end, step {self._end_step}: all "
            "but the one with the largest norm for its weight are dropped; a longer selection tells them apart better",
            stacklevel=2,
        )
        for choice, own in enumerate(self._set.norms()):
            weights = self._weights(choice)
            for k in sorted(own, key=lambda k: own[k] / weights[k])[:-1]:
                drop(choice, k, {})

    def _weights(self, choice: int) -> dict[int, float]:
        """w_k. The cost is a share of these layers' own, since the weight only compares their candidates."""
        return {
            k: self._units[choice][k] * (1 + self._cost_weight * self._set.cost(choice, k, of_all=False))
            for k in self._set.alive(choice)
        }
