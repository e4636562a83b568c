"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) with label smoothing, and the loss for soft labels."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["cut_box", "mix", "soft_cross_entropy", "soft_labels"]


def mix(
    images: Tensor,
    labels: Tensor,
    num_labels: int,
    generator: Generator,
    *,
    mixup: float,
    cutmix: float,
    switch: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Mixes each image with its counterpart from the other end of the batch.

    One draw a batch, as timm's default: mixup, `lambda * x + (1 - lambda) * x'`, or CutMix, a box of x' in x, where
    lambda becomes the share of x that is left. The labels are mixed by the same lambda. Of an odd batch the middle
    image stays.

    Args:
        images: `[N, 3, H, W]`; they are not changed.
        labels: Classes, `[N]`.
        num_labels: How many there are, C.
        generator: On the CPU.
        mixup: Parameter of the Beta distribution of lambda; 0 for none.
        cutmix: The same for CutMix.
        switch: Probability of CutMix where both are on.
        smoothing: Share of the label's mass that goes to all classes alike.

    Returns:
        The images, and the labels as probabilities, `[N, C]`.
    """
    share, use_cutmix = _draw(mixup, cutmix, switch, generator)
    other = images.flip(0)
    if use_cutmix:
        left, top, width, height = cut_box(share, *images.shape[2:], generator)
        images = images.clone()
        images[..., top : top + height, left : left + width] = other[..., top : top + height, left : left + width]
        share = 1 - width * height / (images.shape[2] * images.shape[3])
    elif share < 1:
        images = share * images + (1 - share) * other
    targets = soft_labels(labels, num_labels, smoothing)
    return images, share * targets + (1 - share) * targets.flip(0)


def cut_box(share: float, height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
    """A box (left, top, width, height) of `1 - share` of the area around a random pixel, cut off at the border."""
    side = math.sqrt(1 - share)
    left, right = _interval(int(width * side), width, generator)
    top, bottom = _interval(int(height * side), height, generator)
    return left, top, right - left, bottom - top


def soft_labels(labels: Tensor, num_labels: int, smoothing: float) -> Tensor:
    """`(1 - smoothing) * onehot + smoothing / C`, `[N, C]`."""
    return F.one_hot(labels, num_labels) * (1 - smoothing) + smoothing / num_labels


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """`compute_loss_func` of Trainer: cross entropy with labels that are classes `[N]` or probabilities `[N, C]`.

    With `num_items_in_batch`, which counts all images of an optimizer step, it is their sum over that number, so that
    accumulated gradients are those of the whole batch.
    """
    logits = outputs["logits"].float()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / torch.as_tensor(num_items_in_batch, device=logits.device)


def _draw(mixup: float, cutmix: float, switch: float, generator: Generator) -> tuple[float, bool]:
    """Lambda, and whether it is for CutMix."""
    seed, draw = torch.randint(2**31, (1,), generator=generator).item(), torch.rand(1, generator=generator).item()
    use_cutmix = cutmix > 0 and (mixup == 0 or draw < switch)
    alpha = cutmix if use_cutmix else mixup
    # torch's Beta distribution takes no generator.
    return (float(np.random.default_rng(int(seed)).beta(alpha, alpha)) if alpha > 0 else 1.0), use_cutmix


def _interval(length: int, size: int, generator: Generator) -> tuple[int, int]:
    centre = int(torch.randint(size, (1,), generator=generator))
    return max(centre - length // 2, 0), min(centre + (length + 1) // 2, size)
