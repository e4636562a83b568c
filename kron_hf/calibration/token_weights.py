"""How much each token counts in the fit."""

from collections.abc import Callable

import torch
from torch import Tensor

from kron_hf.calibration.batches import Batch

__all__ = ["TokenWeights", "cls_weights", "no_weights"]

# From a batch and the inputs `[..., in_features]` of a layer to weights of its rows, or None where all count alike.
TokenWeights = Callable[[Batch, Tensor], Tensor | None]


def no_weights(batch: Batch, x: Tensor) -> Tensor | None:
    """All tokens alike, but for padding, which does not count."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
        return mask.to(torch.float64).flatten()
    return None


def cls_weights(tokens: int) -> TokenWeights:
    """The first of `tokens` counts half as much as all others together; inputs of other lengths count alike.

    For 16 patches it is the factor of 8 that was found best for DINOv2-small.
    """

    def weights(batch: Batch, x: Tensor) -> Tensor | None:
        plain = no_weights(batch, x)
        if x.ndim != 3 or x.shape[1] != tokens or tokens < 3:
            return plain
        each = torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)
        each[:, 0] = (tokens - 1) / 2
        return each.flatten() if plain is None else each.flatten() * plain

    return weights
