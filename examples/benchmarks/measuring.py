"""Time and memory of training steps; runs that are compared alternate, so that other work meets them alike."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from examples.benchmarks.subjects import Subject

__all__ = ["Measured", "alternate", "forward_flops", "memory", "roof"]

ROOF_SIZES = {"cpu": (2048, 2**26), "cuda": (8192, 2**28)}  # of the product's matrices, and floats to copy


@dataclass
class Measured:
    """A model, how it is run, and its optimizer; None if it is not trained."""

    model: nn.Module
    subject: Subject
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def of(cls, model: nn.Module, subject: Subject, *, trained: bool) -> "Measured":
        """With AdamW for what can be trained."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(model, subject, torch.optim.AdamW(parameters, lr=1e-5, fused=True) if trained else None)

    def forward(self) -> Tensor:
        """Without gradients."""
        with torch.no_grad():
            return self.subject.run(self.model)

    def step(self, mark: Callable[[], object] = lambda: None) -> None:
        """A training step; `mark` is called between backward and optimizer."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.subject.backward(self.subject.run(self.model))
        mark()
        self.optimizer.step()


def alternate(runs: Mapping[str, Measured], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of the forward in eval mode, of forward + backward in training, and of the whole step."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for repeat in range(-2, repeats):  # the first two warm up, compile and allocate optimizer state
        for name, measured in runs.items():
            for what, milliseconds in _timed(measured).items():
                if repeat >= 0:
                    times[name].setdefault(what, []).append(milliseconds)
    return {name: {what: median(values) for what, values in own.items()} for name, own in times.items()}


def _timed(measured: Measured) -> dict[str, float]:
    device = measured.subject.inputs.device
    measured.model.eval()
    start = _now(device)
    measured.forward()
    times = {"forward_ms": _now(device) - start}
    if measured.optimizer is not None:
        measured.model.train()
        clock = [_now(device)]
        measured.step(lambda: clock.append(_now(device)))
        times |= {"both_ms": clock[1] - clock[0], "step_ms": _now(device) - clock[0]}
    return {what: 1e3 * seconds for what, seconds in times.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(measured: Measured, *, hooks: bool = True) -> dict[str, int | None]:
    """Bytes, after a first step: those saved for backward, of optimizer state, and at the peak of a step.

    Saved are tensors that are no parameters, each once; None without `hooks`, which compiled code does not run. The
    peak is what lives at rest (parameters, buffers, optimizer state, the input) and the most that a step allocates in
    addition, counted by torch's allocator: of a CPU without what MKL takes for itself.
    """
    if measured.optimizer is None:
        return {"saved_bytes": None, "optimizer_bytes": None, "peak_bytes": None}
    measured.model.train()
    states = measured.optimizer.state.values()
    state = [value for entries in states for value in entries.values() if isinstance(value, Tensor)]
    resting = [*measured.model.parameters(), *measured.model.buffers(), *state, measured.subject.inputs]
    saved = _saved_bytes(measured) if hooks else None
    measured.optimizer.zero_grad()
    peak = _bytes_of(resting) + _most_allocated(measured.step, measured.subject.inputs.device)
    measured.optimizer.zero_grad()
    return {"saved_bytes": saved, "optimizer_bytes": _bytes_of(state), "peak_bytes": peak}


def _saved_bytes(measured: Measured) -> int:
    # Storages and detached tensors: tensors would keep the graph that keeps them, with all activations, for ever.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = measured.subject.run(measured.model)
    del out
    for parameter in measured.model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


def _bytes_of(tensors: list[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _most_allocated(step: Callable[[], object], device: torch.device) -> int:
    """Bytes beyond what is allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def forward_flops(measured: Measured) -> int:
    """Of one forward pass, by torch's counter."""
    measured.model.eval()
    with FlopCounterMode(display=False) as counter:
        measured.forward()
    return counter.get_total_flops()


def roof(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do: FLOP/s of a large product and bytes/s of a large copy, the best of five."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    size, floats = ROOF_SIZES[device]
    left, right, source, target = (torch.ones(shape, **where) for shape in ((size, size),) * 2 + ((floats,),) * 2)
    product = min(_seconds(lambda: left @ right, left.device) for _ in range(5))
    copy = min(_seconds(lambda: target.copy_(source), left.device) for _ in range(5))
    return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * source.nbytes / copy}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = _now(device)
    run()
    return _now(device) - start
