"""How near a compressed model is to the dense one on images, whatever they show."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kron_hf.calibration.passes import first_tensor, hooked
from kron_hf.distillation.states import as_tokens

__all__ = ["AGREEMENT", "FEATURE_ERROR", "fidelity"]

AGREEMENT, FEATURE_ERROR = "same_prediction", "feature_error"


def fidelity(
    dense: PreTrainedModel, model: PreTrainedModel, images: Dataset[Any], *, batch_size: int
) -> dict[str, float]:
    """Compares two classifiers of the same classes, on one device.

    Args:
        dense: The dense model.
        model: The compressed one.
        images: Rows of `pixel_values`.
        batch_size: Images at a time.

    Returns:
        `same_prediction`: the share of the images for which both predict the same class. `feature_error`: the relative
        error of the final tokens before the head, `||f - f_dense|| / ||f_dense - mean(f_dense)||`, over all images; 1
        for tokens that are always the mean.
    """
    same = error = rows = 0.0
    sums = squares = torch.zeros((), dtype=torch.float64)
    for (wanted, tokens), (found, others) in _outputs(dense, model, images, batch_size):
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        error += float((tokens - others).square().sum())
        rows += len(tokens)
        sums, squares = sums + tokens.sum(0), squares + tokens.square().sum(0)
    spread = float((squares - sums.square() / rows).clamp_min(0).sum())
    length: Any = images
    return {AGREEMENT: same / len(length), FEATURE_ERROR: (error / spread) ** 0.5 if spread else float(error > 0)}


def _outputs(
    dense: PreTrainedModel, model: PreTrainedModel, images: Dataset[Any], batch_size: int
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Of both models, logits `[N, classes]` and final tokens `[N * tokens, features]`."""
    for batch in tqdm(DataLoader(images, batch_size), desc="Comparing", unit="batch", delay=1.0, leave=False):
        yield _output(dense, batch["pixel_values"]), _output(model, batch["pixel_values"])


@torch.no_grad()
def _output(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    tokens: list[Tensor] = []
    base: Any = model.base_model
    with hooked(after={base: lambda output: tokens.append(_final_tokens(output))}):
        logits = model.eval()(pixel_values=pixels.to(model.device)).logits
    return logits.cpu(), tokens[0]


def _final_tokens(output: Any) -> Tensor:
    found = first_tensor(output)
    assert found is not None
    return as_tokens(found).flatten(0, -2).double().cpu()
