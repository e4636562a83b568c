"""Fits the linear head of a classifier to the features of its backbone: multinomial logistic regression."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

__all__ = ["fit_head", "head_of", "logistic_regression"]

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)  # of standardised features; held-out images choose
Features = tuple[Tensor, Tensor]  # [N, features] and labels [N]


def fit_head(model: PreTrainedModel, train: Dataset[Any], validation: Dataset[Any], *, batch_size: int = 64) -> float:
    """Replaces weight and bias of the head by those that fit the training images best; all else stays.

    Args:
        model: A classifier whose head is one linear layer.
        train: Rows of `pixel_values` and `labels` to fit it to.
        validation: Rows that choose the strength of the penalty.
        batch_size: Images at a time.

    Returns:
        The share of the validation images that it gets right.

    Raises:
        ValueError: The head is of another kind, or the features are not finite.
    """
    head = head_of(model)
    fitting, held_out = (_features(model, head, images, batch_size) for images in (train, validation))
    mean, std = fitting[0].mean(0), fitting[0].std(0, correction=0).clamp_min(1e-6)
    weight = torch.zeros(head.out_features, head.in_features, dtype=torch.float64)
    bias = torch.zeros(head.out_features, dtype=torch.float64)
    scaled, unseen = (fitting[0] - mean) / std, (held_out[0] - mean) / std
    best: tuple[float, Tensor, Tensor] | None = None
    for ridge in RIDGES:  # each begins where the stronger penalty has ended
        weight, bias = logistic_regression(scaled, fitting[1], weight, bias, ridge)
        loss = float(nn.functional.cross_entropy(unseen @ weight.T + bias, held_out[1]))
        if best is None or loss < best[0]:
            best = loss, weight, bias
    assert best is not None
    _, weight, bias = best
    hits = (unseen @ weight.T + bias).argmax(-1) == held_out[1]
    weight = weight / std
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias - weight @ mean)
    return float(hits.double().mean())


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The only linear layer outside of the backbone.

    Raises:
        ValueError: There is none, or more than one.
    """
    backbone: Any = model.base_model
    inside = set(backbone.modules())
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in inside]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} linear layers outside of its backbone, {found}, and a head is "
            "fitted if it is one; train a classifier first, as with kron-hf train"
        )
    head = model.get_submodule(found[0])
    assert isinstance(head, nn.Linear)
    return head


def logistic_regression(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """The minimum of `mean cross-entropy + ridge / 2 * ||weight||^2`, by L-BFGS.

    Args:
        features: `[N, features]`.
        labels: `[N]`.
        weight: Where to begin, `[classes, features]`.
        bias: Likewise, `[classes]`.
        ridge: Strength of the penalty.
    """
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(features @ weight.T + bias, labels) + ridge / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


@torch.no_grad()
def _features(model: PreTrainedModel, head: nn.Linear, images: Dataset[Any], batch_size: int) -> Features:
    """What the head gets, in float64."""
    model.eval()
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().cpu()))
    try:
        for batch in tqdm(DataLoader(images, batch_size), desc="Features", unit="batch", delay=1.0, leave=False):
            model(pixel_values=batch["pixel_values"].to(model.device))
            labels.append(batch["labels"])
    finally:
        hook.remove()
    features = torch.cat(seen)
    if features.dim() != 2 or not bool(features.isfinite().all()):
        kind = "not finite" if features.dim() == 2 else f"of shape {list(features.shape)}"
        raise ValueError(f"a head needs one vector of finite features for each image, but they are {kind}")
    return features, torch.cat(labels)
