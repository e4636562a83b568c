"""How much each token counts in the fit."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from kron_hf.calibration.batches import Batch, example_count, real_tokens
from kron_hf.calibration.gradients import OutputGradients
from kron_hf.calibration.route import Route

__all__ = ["TokenWeights", "first_token_weights", "no_weights", "weights_by_stage"]

LEAST = 0.02  # of the mean

# From a batch and the inputs `[..., in_features]` of a layer to weights of its rows, or None where all count alike.
TokenWeights = Callable[[Batch, Tensor], Tensor | None]


def no_weights(batch: Batch, x: Tensor, mask: str = "attention_mask") -> Tensor | None:
    """All tokens alike, but for padding by that entry of the batch, which does not count."""
    found = real_tokens(batch, x.shape[:-1], mask)
    return None if found is None else found.to(torch.float64).flatten()


def first_token_weights(first: float, others: float, mask: str = "attention_mask") -> TokenWeights:
    """The first token of an example counts `first`, each of the others `others`, and padding nothing.

    No token counts less than a fiftieth of the mean. Inputs whose rows are not the tokens of examples count alike.
    """

    def weights(batch: Batch, x: Tensor) -> Tensor | None:
        plain = no_weights(batch, x, mask)
        if x.ndim != 3 or len(x) != example_count(batch) or x.shape[1] < 2:
            return plain
        tokens = x.shape[1]
        least = LEAST * (first + (tokens - 1) * others) / tokens
        each = torch.full(x.shape[:-1], max(others, least), dtype=torch.float64, device=x.device)
        each[:, 0] = max(first, least)
        return each.flatten() if plain is None else each.flatten() * plain

    return weights


def weights_by_stage(
    route: Route, gradients: Mapping[str, OutputGradients], counted: Collection[str] | None = None
) -> dict[str, TokenWeights]:
    """By the first name of each stage; the linears of a stage are fitted to the same rows, with the same weights.

    Args:
        route: All stages.
        gradients: Of every linear's outputs.
        counted: Linears that are fitted at all: others, which stay dense, have no say. None is all.
    """
    found: dict[str, TokenWeights] = {}
    for stage in (stage for block in route.blocks for stage in block.stages):
        own = [gradients[name] for name in stage if counted is None or name in counted]
        first, others = math.fsum(each.first or 0.0 for each in own), math.fsum(each.others or 0.0 for each in own)
        if first > 0 or others > 0:
            found[stage[0]] = first_token_weights(first, others)
    return found
