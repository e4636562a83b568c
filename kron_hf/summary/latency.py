"""How long two models take for the same images, run in turn so that other work on the machine meets both alike."""

import platform
import time
from statistics import median
from typing import Any

import torch

__all__ = ["alternating_milliseconds", "machine"]

RUNS, SECONDS = 30, 10.0  # as many runs of each as fit into that time, three at least
LEAST = 3


@torch.no_grad()
def alternating_milliseconds(models: list[Any], batch: dict[str, Any]) -> tuple[list[float], int]:
    """The median milliseconds of one forward of each model, and of how many.

    Args:
        models: On one device, in evaluation mode.
        batch: What they are called with, on their device.
    """
    for model in models:
        _milliseconds(model, batch)  # warms up
    runs: list[list[float]] = []
    begin = time.perf_counter()
    while len(runs) < LEAST or (len(runs) < RUNS and time.perf_counter() - begin < SECONDS):
        runs.append([_milliseconds(model, batch) for model in models])
    return [median(column) for column in zip(*runs, strict=True)], len(runs)


def machine(device: torch.device) -> str:
    """What it was measured on."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{what}, torch {torch.__version__.partition('+')[0]}"


def _milliseconds(model: Any, batch: dict[str, Any]) -> float:
    _wait(model.device)
    begin = time.perf_counter()
    model(**batch)
    _wait(model.device)
    return 1e3 * (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    """Kernels of an accelerator return before they are done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
