"""Beginning again with the candidate that was chosen: its factors, what the optimizer knows of them, the schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kron_hf.kron_layer import KronLayer
from kron_hf.selection.selector_state import checked_state
from kron_hf.sharding import local, shard_of

__all__ = ["continue_schedule", "forget", "redraw", "remaining_share", "run_schedule_again", "schedule_of"]


def forget(optimizer: Optimizer, parameters: list[nn.Parameter], *, leave: bool) -> None:
    """Clears what the optimizer knows of the parameters.

    Args:
        optimizer: The optimizer.
        parameters: Some of its parameters; others are ignored.
        leave: Whether they leave its groups as well.
    """
    gone = {id(parameter) for parameter in parameters}
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
    if leave:
        for group in optimizer.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]


@torch.no_grad()
def redraw(layer: KronLayer, variance: float, generator: torch.Generator) -> None:
    """Draws factors anew, as `reset_factors` of the layer does, from a generator on the CPU: the same on any device."""
    std = (variance / layer.rank) ** 0.25
    for name, factor in (("a", layer.a), ("b", layer.b)):
        drawn: Tensor = torch.randn(layer.factor_shapes[name], generator=generator) * std
        local(factor).copy_(shard_of(drawn.to(factor.dtype), factor))
    local(layer.s).fill_(1.0)


def schedule_of(scheduler: Any) -> LambdaLR:
    """The `LambdaLR` inside wrappers such as Accelerate's.

    Raises:
        TypeError: It is another schedule, which cannot be run again over fewer steps.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, LambdaLR):
        raise TypeError(
            f"restart=True runs the learning-rate schedule again over the remaining steps, which needs a LambdaLR (all "
            f"of transformers' schedules but reduce_lr_on_plateau and greedy are one), got {type(inner).__name__}; "
            "pass restart=False"
        )
    return inner


def continue_schedule(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Lets a schedule go on as in a selection that has ended and whose model holds plain layers by now.

    Args:
        scheduler: The schedule.
        state: The state of the `BlockSizeSelector`.
    """
    state = checked_state(state)
    if state["restarted_at"] is not None:
        run_schedule_again(schedule_of(scheduler), state["restarted_at"], remaining_share(state))


def remaining_share(state: Mapping[str, Any]) -> float:
    """Share of the training's steps that come after the last drop, by the state of a `BlockSizeSelector`."""
    return 1 - max((event["step"] for event in state["events"]), default=0) / state["total_steps"]


def run_schedule_again(scheduler: LambdaLR, begun: int, remaining: float) -> None:
    """From epoch `begun` of the schedule on, all of it passes within the remaining share of the training.

    Args:
        scheduler: The schedule.
        begun: Its `last_epoch` at the first step of the second run.
        remaining: Share of the training's steps that are left, in [0, 1].
    """
    if remaining <= 0:
        return
    scheduler.lr_lambdas = [_again(function, begun, remaining) for function in scheduler.lr_lambdas]


def _again(function: Callable[[int], float], begun: int, remaining: float) -> Callable[[int], float]:
    def again(epoch: int) -> float:
        return function(epoch if epoch < begun else int((epoch - begun) / remaining))

    return again
