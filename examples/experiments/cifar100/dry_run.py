"""What a run would be, without data and without training."""

import torch
from run_plan import Plan
from sparsity_methods import build_dense, convert
from torch.utils.flop_counter import FlopCounterMode

from kron_hf import kron_summary

__all__ = ["describe"]

TRAIN_IMAGES = 45_000  # CIFAR-100's 50,000 without the tenth that is held out
LABELS = 100


def describe(plan: Plan) -> str:
    """The recipe, the steps, and what the model costs."""
    names = [str(label) for label in range(LABELS)]
    size = plan.augmentation.image_size
    with torch.device("meta"):
        dense = build_dense(plan.model, names, size, plan.overrides, plan.training.drop_path)
        dense_flops = _forward_flops(dense, size)
        model = convert(dense, plan.method)
        flops = _forward_flops(model, size)
    summary = kron_summary(model)
    trained = summary.trained_params
    lines = {
        "run": plan.name(),
        "model": f"{type(model).__name__}, {size} x {size} pixels, {plan.overrides or 'sizes as declared'}",
        "parameters": f"{trained:,} trained, {summary.deployed_params:,} deployed, {summary.dense_params:,} dense",
        "converted layers": f"{len(summary.layers)}, {summary.converted.trained_params:,} parameters of "
        f"{summary.converted.dense_params:,}",
        "FLOPs an image": f"forward {flops:,} of {dense_flops:,} dense; training three times that",
        "weights, gradients, AdamW": f"{16 * trained / 2**20:,.1f} MiB in float32, activations not counted",
        "images a step": f"{plan.global_batch} = {plan.per_device_batch} x {plan.processes} processes x "
        f"{plan.accumulation} accumulated",
        "steps": f"{plan.steps(TRAIN_IMAGES):,}, {plan.steps_per_epoch(TRAIN_IMAGES)} an epoch of {TRAIN_IMAGES:,} "
        f"images, {plan.warmup_steps(TRAIN_IMAGES)} to warm up",
        "learning rate": f"{plan.learning_rate:g} ({plan.base_rate:g} at {plan.training.global_batch} images)",
        "training": str(plan.training),
        "augmentation": str(plan.augmentation),
        "method": str(plan.method),
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items())


def _forward_flops(model: torch.nn.Module, size: int) -> int:
    """Of one image, a multiply-add as 2; on the meta device, because the CPU's attention is not counted."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()
