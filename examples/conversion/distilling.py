"""Distillation of a converted model from the dense one, on data without labels."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from kron_hf import DistillationLoss, kron_param_groups

__all__ = ["distill"]

BATCH = 64
WARM_UP = 0.1  # share of the steps


def distill(
    model: nn.Module,
    teacher: nn.Module,
    size: int,
    batch: Callable[[Tensor], dict[str, Tensor]],
    steps: int,
    *,
    learning_rate: float,
    seed: int = 0,
) -> float:
    """Trains what requires gradients, with AdamW, gradients clipped to norm 1, warm-up and a cosine to zero.

    Args:
        model: Changed in place.
        teacher: The dense model.
        size: Number of examples.
        batch: Gives the model's inputs for some indices of examples.
        steps: Of the optimizer.
        learning_rate: Its peak, of all parameters.
        seed: Of the order of examples.

    Returns:
        The seconds it took.
    """
    began = time.perf_counter()
    loss = DistillationLoss(teacher)
    optimizer = torch.optim.AdamW(kron_param_groups(model, learning_rate, weight_decay=0.01, factor_lr=1.0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=WARM_UP
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in trange(steps, desc="distillation", leave=False):
        chosen = torch.randint(size, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss.compute(model, batch(chosen)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return round(time.perf_counter() - began, 1)
