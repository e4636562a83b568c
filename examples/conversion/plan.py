"""The declared conversions, most important first."""

from dataclasses import dataclass

__all__ = ["PLAN", "Conversion"]

SEEDS = (0, 1, 2)
BUDGETS = (0.04, 0.13, 0.25)
LOW_RANK = ((1, -1),)
SIXTEENTHS = {0.04: 8, 0.13: 28}  # ranks of 16 x 16 that come to the budget
RECTANGLES = {0.04: 8, 0.13: 28}  # and of 4 x 64


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion of the whole model.

    Attributes:
        method: `"calibrated"`, `"nearest"` or `"random"`.
        budget: `target_params`; None for a uniform size.
        block_size: Of the uniform size.
        rank: Of the uniform size.
        menu: Shapes that the budget chooses from; None is the default.
        mixed: Whether half of the calibration images are photographs.
        images: Calibration images.
        distill_steps: Steps of distillation afterwards.
        learning_rate: Of that.
        seed: Chooses the calibration images, and draws random factors.
    """

    method: str = "calibrated"
    budget: float | None = None
    block_size: tuple[int, int] | None = None
    rank: int | None = None
    menu: tuple[tuple[int, int], ...] | None = None
    mixed: bool = False
    images: int = 2000
    distill_steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0


def _plan() -> list[Conversion]:
    plan = [Conversion(budget=budget, seed=seed) for budget in BUDGETS for seed in SEEDS]
    for method in ("nearest", "random"):
        plan += [Conversion(method=method, block_size=(16, 16), rank=rank) for rank in SIXTEENTHS.values()]
    plan += [Conversion(block_size=(4, 64), rank=RECTANGLES[0.04], seed=seed) for seed in SEEDS]
    plan += [Conversion(block_size=(16, 16), rank=SIXTEENTHS[0.04], seed=seed) for seed in SEEDS]
    plan += [Conversion(budget=0.04, distill_steps=300, learning_rate=1e-5, seed=seed) for seed in SEEDS]
    plan += [Conversion(budget=0.04, distill_steps=300, learning_rate=5e-4, seed=seed) for seed in SEEDS[:2]]
    plan += [Conversion(budget=0.04, mixed=True, seed=seed) for seed in SEEDS]
    plan += [Conversion(budget=budget, menu=LOW_RANK, seed=seed) for budget in BUDGETS for seed in SEEDS]
    plan += [Conversion(budget=budget, mixed=True, seed=seed) for budget in BUDGETS[1:] for seed in SEEDS]
    plan += [Conversion(budget=0.5)]
    plan += [Conversion(budget=budget, mixed=True, images=4000) for budget in (0.13, 0.04)]
    return plan


PLAN = _plan()
