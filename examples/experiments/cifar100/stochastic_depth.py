"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382) for transformers' ViT and Swin.

`ViTConfig` has no drop path. `SwinConfig.drop_path_rate` drops the attention branch alone, where Swin drops both. Here
forward hooks on the branches do it: no module changes its name, and nothing of it is saved.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinLayer
from transformers.models.vit.modeling_vit import ViTLayer

__all__ = ["add_drop_path", "drop_path"]

# What ends in `+ residual` and is one sample a row; Swin's attention works on windows, and has its own.
BRANCHES: dict[type[nn.Module], tuple[str, ...]] = {ViTLayer: ("attention", "mlp"), SwinLayer: ("mlp",)}


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Zeroes the branch `[N, ...]` of each sample with probability `rate`, and divides the others by `1 - rate`."""
    kept = torch.rand(len(branch), device=branch.device) >= rate
    return branch * (kept / (1 - rate)).to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def add_drop_path(model: nn.Module, rate: float) -> None:
    """Drops residual branches in training; the rate grows linearly from 0 at the first layer to `rate` at the last.

    Raises:
        ValueError: The rate is not in [0, 1), or the model has no layers that are known.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the drop-path rate must be in [0, 1), got {rate!r}")
    layers = [module for module in model.modules() if type(module) in BRANCHES]
    if not layers:
        known = [kind.__name__ for kind in BRANCHES]
        raise ValueError(f"{type(model).__name__} has no layers of {known}, which add_drop_path knows")
    for index, layer in enumerate(layers):
        own = rate * index / max(len(layers) - 1, 1)
        if own > 0:
            for name in BRANCHES[type(layer)]:
                layer.get_submodule(name).register_forward_hook(_hook(own))


def _hook(rate: float) -> Any:
    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return None
        if isinstance(output, tuple):  # attention, with its weights
            return drop_path(output[0], rate), *output[1:]
        return drop_path(output, rate)

    return drop
