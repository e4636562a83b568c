"""The formulas. Each is a mean over the examples of a batch.

The value of an example depends on no other example, so that the mean over micro-batches or processes of equal size is
the mean over the whole batch. Half precision is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine_distance", "kl_divergence", "relative_mse", "task_loss"]

_EPS = 1e-6  # beside a variance, as in the normalised targets of MAE
_LEAST = 0.01


def relative_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the examples of ||s - t||^2 / ||t - mean(t)||^2, with the mean over the tokens of the example.

    Without the mean, features that are large and the same everywhere, as in DINOv2, would hide all others: with it 1 is
    the error of a student that gives every token of an example the same best vector. Where the tokens are alike, which
    would make little of the error much, the norm is at least a hundredth of that about each token's own mean over the
    features, and with a single token it is that.

    Args:
        student: `[batch, tokens, features]`.
        teacher: The same shape.
        mask: `[batch, tokens]`, 0 where a token does not count.

    Returns:
        A scalar.

    Example:
        >>> tokens = torch.tensor([[[1.0, 3.0], [5.0, 9.0]]])
        >>> relative_mse(tokens.mean(1, keepdim=True).expand_as(tokens), tokens).round(decimals=4)
        tensor(1.)
    """
    student, teacher = _wide(student), _wide(teacher)
    mask = teacher.new_ones(teacher.shape[:2]) if mask is None else mask.to(teacher)
    count = mask.sum(1)  # [batch]
    mean = (teacher * mask[..., None]).sum(1, keepdim=True) / count.clamp_min(1)[:, None, None]
    spread = ((teacher - mean).square().mean(-1) * mask).sum(1)
    own_spread = (teacher.var(-1, correction=0) * mask).sum(1)
    spread = torch.where(count > 1, torch.maximum(spread, _LEAST * own_spread), own_spread)
    error = ((student - teacher).square().mean(-1) * mask).sum(1)
    return (error / (spread + _EPS * count.clamp_min(1))).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos(s, t), in [0, 2]; both `[batch, features]`."""
    return (1 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)).mean()


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of Hinton et al., arXiv:1503.02531.

    T^2 keeps the gradient's size the same for all T.

    Args:
        student: Logits `[batch, classes]`, or `[batch, tokens, classes]` with the mean over the tokens of each example.
        teacher: The same shape.
        temperature: T.
        mask: `[batch, tokens]`, 0 where a token does not count.
    """
    student, teacher = _wide(student) / temperature, _wide(teacher) / temperature
    pointwise = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="none")
    return temperature**2 * _mean(pointwise.sum(-1), mask)


def task_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The loss that transformers' classifiers have, from logits and labels.

    Cross-entropy for integer labels (-100 does not count), binary cross-entropy for several labels at once, squared
    error for one logit.

    Args:
        logits: `[batch, classes]` or `[batch, tokens, classes]`.
        labels: Integers without the last dimension, or floats.
        num_items_in_batch: What the sum is divided by; None for the mean.
    """
    logits = _wide(logits)
    reduction = "mean" if num_items_in_batch is None else "sum"
    if not labels.is_floating_point():
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction=reduction)
    elif logits.shape[-1] == 1:
        loss = F.mse_loss(logits.flatten(), labels.to(logits).flatten(), reduction=reduction)
    else:
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens of each example, then over the examples."""
    if mask is None:
        return values.mean()
    mask = mask.to(values)
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
