"""Distillation of a converted backbone from the dense one, on images without labels."""

import time

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from kron_hf import DistillationLoss, kron_param_groups

__all__ = ["distill"]

BATCH = 64
LEARNING_RATE = 5e-4  # of all parameters: the start is good
WARM_UP = 0.1  # share of the steps


def distill(model: nn.Module, teacher: nn.Module, images: Tensor, steps: int, *, seed: int = 0) -> float:
    """Trains in place with AdamW, gradients clipped to norm 1, warm-up and a cosine to zero; returns the seconds."""
    began = time.perf_counter()
    loss = DistillationLoss(teacher)
    optimizer = torch.optim.AdamW(kron_param_groups(model, LEARNING_RATE, weight_decay=0.01, factor_lr=1.0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=WARM_UP
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in trange(steps, desc="distillation", leave=False):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss.compute(model, {"pixel_values": images[chosen]}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return round(time.perf_counter() - began, 1)
