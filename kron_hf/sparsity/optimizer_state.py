"""What optimizers know about one parameter: its step size, and its state, which masks and rescaling must follow.

Adam, AdamW and those that keep their state under the same names, plain or fused; SGD. Entries of sharded parameters
(FSDP2) are handled where they lie.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from kron_hf.sharding import local, shard_of

__all__ = ["clear_state", "group_of", "overflowed", "raw_optimizer", "rescale_state", "step_size"]

# How the entries of a state tensor depend on the scale of the gradient.
_POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def raw_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's.

    Raises:
        TypeError: There is none.
    """
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"a torch.optim.Optimizer is required to attach to, got a {type(optimizer).__name__}")
    return optimizer


def overflowed(optimizer: Optimizer) -> bool:
    """Whether the step was none: fused optimizers, on which `GradScaler` sets `found_inf`, skip an overflow inside."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def step_size(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | float:
    """By what each entry's gradient was multiplied in the last step: the preconditioned learning rate.

    `lr` under SGD, and `lr / (sqrt(v_hat) + eps)` with `v_hat = v / (1 - beta2 ** step)` under Adam, where v is
    `exp_avg_sq` (`max_exp_avg_sq` under amsgrad). 0 where the optimizer has not yet moved the parameter.

    Returns:
        A number or a tensor like `local(parameter)`.

    Raises:
        ValueError: The optimizer does not hold the parameter.
        TypeError: It is neither SGD nor like Adam.
    """
    group = group_of(optimizer, parameter)
    if isinstance(optimizer, SGD):
        return group["lr"]
    state = optimizer.state.get(parameter)
    if "betas" not in group or "eps" not in group or (state and ("exp_avg_sq" not in state or "step" not in state)):
        raise TypeError(
            f"l1 needs an optimizer whose step sizes are known, SGD or one with the state of Adam (exp_avg_sq, step, "
            f"betas, eps), got {type(optimizer).__name__}"
        )
    if not state:
        return 0.0
    step = state["step"]
    if isinstance(step, Tensor) and step.device.type == "cpu":
        step = step.item()  # in double precision, as Adam does; on other devices it would wait for them
    second_moment = local(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
    correction = (1 - group["betas"][1] ** step) ** 0.5
    return group["lr"] / (second_moment.sqrt() / correction + group["eps"])


def clear_state(optimizer: Optimizer, parameter: nn.Parameter, dead: Tensor) -> None:
    """Zeroes the state of dead entries; `dead` is whole and of the parameter's shape."""
    for value in _state_tensors(optimizer, parameter).values():
        local(value).masked_fill_(shard_of(dead, parameter), 0.0)


def rescale_state(optimizer: Optimizer, parameter: nn.Parameter, factor: Tensor) -> None:
    """Makes the state that of gradients `factor` times as large; `factor` is like `local(parameter)`."""
    for name, value in _state_tensors(optimizer, parameter).items():
        if name in _POWERS:
            local(value).mul_(factor ** _POWERS[name])


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter group of an S.

    Raises:
        ValueError: The optimizer does not hold it.
    """
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            return group
    raise ValueError(
        f"the optimizer must hold every S, but an S of shape {list(parameter.shape)} is not among the parameters of "
        f"{type(optimizer).__name__}"
    )


def _state_tensors(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
    }
