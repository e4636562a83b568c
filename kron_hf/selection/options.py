"""The options of a block-size selection, and the steps they mean."""

import math
from dataclasses import dataclass

from kron_hf.selection.costs import COSTS

__all__ = ["MODES", "PENALTY_WEIGHTS", "SCOPES", "SelectionOptions"]

MODES = ("validation", "penalty")
SCOPES = ("global", "layer")
PENALTY_WEIGHTS = ("norm", "size")


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """The options of a `BlockSizeSelector`, checked; see there.

    Raises:
        ValueError: An option is outside its range, of `cost` and `cost_weight` only one is given, or `penalty_weights`
            in validation mode.
    """

    mode: str = "validation"
    scope: str = "global"
    cost: str | None = None
    cost_weight: float = 0.0
    penalty_weights: str = "norm"
    start: float = 0.1
    end: float = 0.5
    restart: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("scope", self.scope, SCOPES),
            ("cost", self.cost, COSTS),
            ("penalty_weights", self.penalty_weights, PENALTY_WEIGHTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if not (_is_number(self.cost_weight) and 0 <= self.cost_weight < math.inf):
            raise ValueError(f"cost_weight must be a finite number that is not negative, got {self.cost_weight!r}")
        if self.mode == "validation" and self.penalty_weights != "norm":
            raise ValueError(f"penalty_weights={self.penalty_weights!r} needs mode='penalty', got mode='validation'")
        if (self.cost is None) != (self.cost_weight == 0):
            raise ValueError(
                f"cost and a cost_weight above 0 go together, got cost={self.cost!r} and "
                f"cost_weight={self.cost_weight!r}"
            )
        for name, value in (("start", self.start), ("end", self.end)):
            if not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be a share of the training steps in [0, 1], got {value!r}")
        if self.start >= self.end:
            raise ValueError(f"start must be before end, got start={self.start!r}, end={self.end!r}")
        if not isinstance(self.restart, bool | None):
            raise ValueError(f"restart must be a bool or None, got {self.restart!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an int in [0, 2**32), got {self.seed!r}")

    @property
    def restarts(self) -> bool:
        """Whether the winner begins again; None is: after a penalty, which has shrunk it."""
        return self.mode == "penalty" if self.restart is None else self.restart

    def span(self, total_steps: int, drops: int) -> tuple[int, int]:
        """The steps at which the selection starts and ends.

        Args:
            total_steps: Optimizer steps of the whole training.
            drops: How many candidates have to go, one at a time.

        Raises:
            ValueError: There are fewer steps than drops.
        """
        if type(total_steps) is not int or total_steps < 1:
            raise ValueError(f"total_steps must be a positive int, got {total_steps!r}")
        start_step, end_step = round(self.start * total_steps), round(self.end * total_steps)
        if end_step - start_step < drops:
            raise ValueError(
                f"training is shorter than the selection needs: {drops} candidates have to be dropped, one a step, and "
                f"with total_steps={total_steps} there are {end_step - start_step} steps from step {start_step} "
                f"(start={self.start}) to step {end_step} (end={self.end}); train longer, or offer fewer candidates"
            )
        return start_step, end_step


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
