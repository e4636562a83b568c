"""One run: a plain torch loop, the same for every method. AdamW, warm-up over 5 % of the steps, then a cosine to 0."""

import math
import platform
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from examples.experiments.cases import Run
from examples.experiments.images import ImageTensors, load_image_tensors
from examples.experiments.methods import Prepared, prepare
from kron_hf import KronLinear, kron_param_groups, kron_summary
from kron_hf.sparsity import empty_columns, empty_rows
from kron_hf.sparsity.masks import pack_mask
from kron_hf.sparsity.pruning import kron_layers
from kron_hf.summary import block_summary

__all__ = ["accuracy", "execute", "train"]

WARM_UP = 0.05
WHOLE = ("nonzeros", "trained_params", "deployed_params", "dense_params")
CONVERTED = (*WHOLE, "forward_flops", "training_flops", "dense_training_flops")


def execute(run: Run, *, keep_masks: bool = False) -> dict[str, Any]:
    """Trains and measures: the row of results. The test images are read in the final phase alone.

    `seconds` are those of the training on the wall clock, `cpu_seconds` its processor time, which other work on the
    machine disturbs less. `peak_memory_bytes` is the largest resident set of the process up to the end of the training:
    Python, torch, the images and the training itself.
    """
    torch.set_num_threads(1)
    data = load_image_tensors(run.recipe.data, run.recipe.train_images)
    torch.manual_seed(run.seed)
    prepared = prepare(run.candidate, run.recipe.model, data.size, data.classes, run.steps)
    start, cpu_start = time.perf_counter(), time.process_time()
    finite = train(prepared, data, run)
    seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu_start, _peak_memory()
    model = prepared.model.eval()
    row = run.to_row() | {
        "validation_accuracy": accuracy(model, data.validation) if finite else 0.0,
        "test_accuracy": accuracy(model, data.test) if finite and run.phase == "final" else None,
        "diverged": not finite,
        **_costs(prepared),
        "images": [len(split[1]) for split in (data.train, data.validation, data.test)],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_memory_bytes": peak,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} thread",
    }
    return row | {"masks": _masks(model)} if keep_masks else row


def train(prepared: Prepared, data: ImageTensors, run: Run) -> bool:
    """Trains in place; False, early, if the loss is no longer finite."""
    model = prepared.model.train()
    rates = {name: value for name, value in run.candidate.options if name == "factor_lr"}
    groups = kron_param_groups(model, run.learning_rate, weight_decay=run.recipe.weight_decay, **rates)
    optimizer = torch.optim.AdamW(groups, fused=True)
    if prepared.pruner is not None:
        prepared.pruner.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, run.steps))
    for images, labels in _batches(data.train, run):
        loss = nn.functional.cross_entropy(model(images), labels)
        if not math.isfinite(loss.item()):
            return False
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if prepared.pruner is not None:
        prepared.pruner.close()
    return True


@torch.no_grad()
def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    """Share of the images that the model names right."""
    pairs = zip(split[0].split(500), split[1].split(500), strict=True)
    right = sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in pairs)
    return right / len(split[1])


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batches(split: tuple[Tensor, Tensor], run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """As many batches as the run has steps, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(run.seed)
    images, labels = split
    size = min(run.recipe.batch_size, len(labels))
    done = 0
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(size):
            if len(chosen) < size:
                break
            if done == run.steps:
                return
            done += 1
            yield images[chosen], labels[chosen]


def _costs(prepared: Prepared) -> dict[str, Any]:
    """By one meter for all methods; `converted_` names count the compared layers alone."""
    model = prepared.model
    summary = block_summary(model, prepared.layers) if prepared.layers else kron_summary(model)
    krons = kron_layers(model)
    empty = {"empty_rows": empty_rows(krons), "empty_columns": empty_columns(krons)} if krons else {}
    own = {f"converted_{key}": getattr(summary.converted, key) for key in CONVERTED}
    return {"sparsity": summary.sparsity, **{key: getattr(summary, key) for key in WHOLE}, **own, **empty}


def _masks(model: nn.Module) -> dict[str, Any]:
    masks = {name: layer.block_mask for name, layer in model.named_modules() if isinstance(layer, KronLinear)}
    return {name: {"shape": list(mask.shape), "alive": pack_mask(mask)} for name, mask in masks.items()}


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux
