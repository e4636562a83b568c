"""The options of a training to block sparsity, and the steps they mean."""

import math
from dataclasses import dataclass

from kron_hf.sparsity.groups import GROUPS
from kron_hf.sparsity.pruning import SCOPES

__all__ = ["REGROWTHS", "SparsityOptions"]

REGROWTHS = ("interval", "straight_through")


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """The options of a `Sparsifier`, checked; see there.

    Raises:
        ValueError: An option is outside its range, or not exactly one of `target_sparsity` and `l1` is given.
    """

    target_sparsity: float | None = None
    l1: float | None = None
    scope: str = "global"
    start: float = 0.05
    end: float = 0.5
    interval: int = 10
    regrowth: str = "interval"
    group_penalty: float = 0.0
    groups: str = "both"

    def __post_init__(self) -> None:
        target, l1 = self.target_sparsity, self.l1
        if (target is None) == (l1 is None):
            given = f"target_sparsity={target!r} and l1={l1!r}"
            raise ValueError(f"give exactly one of target_sparsity and l1, got {given}")
        if target is not None and not (_is_number(target) and 0 <= float(target) < 1):
            raise ValueError(f"target_sparsity must be a number in [0, 1), got {target!r}")
        if l1 is not None and not (_is_number(l1) and 0 <= float(l1) < math.inf):
            raise ValueError(f"l1 must be a finite number that is not negative, got {l1!r}")
        if l1 is not None and self.scope != "global":
            raise ValueError(f"scope={self.scope!r} needs a target_sparsity: one l1 holds for all layers together")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.regrowth not in REGROWTHS:
            raise ValueError(f"regrowth must be one of {REGROWTHS}, got {self.regrowth!r}")
        if l1 is not None and self.regrowth != "interval":
            raise ValueError(
                f"regrowth={self.regrowth!r} needs a target_sparsity: under l1 nothing is masked before the end"
            )
        if not (_is_number(self.group_penalty) and 0 <= float(self.group_penalty) <= 1):
            raise ValueError(f"group_penalty must be a number in [0, 1], got {self.group_penalty!r}")
        if self.groups not in GROUPS:
            raise ValueError(f"groups must be one of {GROUPS}, got {self.groups!r}")
        for name, value in (("start", self.start), ("end", self.end)):
            if not (_is_number(value) and 0 <= float(value) <= 1):
                raise ValueError(f"{name} must be a share of the training steps in [0, 1], got {value!r}")
        if self.start >= self.end:
            raise ValueError(f"start must be before end, got start={self.start!r}, end={self.end!r}")
        _check_count("interval", self.interval)

    def ramp(self, total_steps: int) -> tuple[int, int]:
        """The steps at which the ramp, or the penalty, starts and ends.

        Raises:
            ValueError: The training is too short for one interval of the ramp.
        """
        _check_count("total_steps", total_steps)
        start_step, end_step = round(self.start * total_steps), round(self.end * total_steps)
        if end_step - start_step < self.interval:
            raise ValueError(
                f"training is shorter than the sparsity schedule needs: with total_steps={total_steps} the ramp runs "
                f"from step {start_step} (start={self.start}) to step {end_step} (end={self.end}), which is less than "
                f"one interval of {self.interval} steps; train longer or pass a smaller interval"
            )
        return start_step, end_step


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
