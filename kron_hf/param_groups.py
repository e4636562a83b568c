"""Optimizer parameter groups for models with Kronecker layers."""

import math
import re
from typing import Any

from torch import nn

from kron_hf.sparsity.pruning import kron_layers

__all__ = ["kron_param_groups"]

# The rule of transformers' Trainer.get_decay_parameter_names, so that the other parameters train as they would there.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def kron_param_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, factor_lr: float = 4.0, mask_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: every trainable parameter once, frozen ones not at all.

    | parameters | learning rate | weight decay |
    |---|---|---|
    | others, but for biases and norms | `lr` | `weight_decay` |
    | biases and norms | `lr` | 0 |
    | S | `lr * mask_lr` | 0: the scale of S against A is arbitrary, so decay would not regularise W |
    | A and B | `lr * factor_lr` | `weight_decay` |

    Groups that would be empty are left out. A model without Kronecker layers gets the first two.

    Args:
        model: The model, before or after it is wrapped.
        lr: Base learning rate.
        weight_decay: Weight decay of everything but S, biases and norms.
        factor_lr: Factor of the learning rate of A and B.
        mask_lr: Factor of the learning rate of S.

    Raises:
        ValueError: A number is negative or not finite, or nothing is trainable.
    """
    numbers = {"lr": lr, "weight_decay": weight_decay, "factor_lr": factor_lr, "mask_lr": mask_lr}
    for name, value in numbers.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    layers = kron_layers(model)
    masks = {id(layer.s) for layer in layers}
    factors = {id(factor) for layer in layers for factor in (layer.a, layer.b)}
    norms = tuple(f"{name}." for name, module in model.named_modules() if name and isinstance(module, nn.LayerNorm))
    decayed = {"params": [], "lr": lr, "weight_decay": weight_decay}
    undecayed = {"params": [], "lr": lr, "weight_decay": 0.0}
    mask_group = {"params": [], "lr": lr * mask_lr, "weight_decay": 0.0}
    factor_group = {"params": [], "lr": lr * factor_lr, "weight_decay": weight_decay}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in masks:
            group = mask_group
        elif id(parameter) in factors:
            group = factor_group
        elif name.startswith(norms) or _NO_DECAY.search(name.lower()):
            group = undecayed
        else:
            group = decayed
        group["params"].append(parameter)
    # The base rate comes first: it is the one that training loops log.
    groups = [group for group in (decayed, undecayed, mask_group, factor_group) if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return groups
