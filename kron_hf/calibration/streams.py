"""Where a projection writes into the residual stream, found by moving its output a little and looking what follows.

In a residual block `stream = residual + scale * y`, with y the projection's output and `scale` the LayerScale (one
without it). What the converted model gets wrong in `residual` the projection can mend, if its targets say so.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import Finish, first_tensor, hooked, run
from kron_hf.calibration.route import Route

__all__ = ["Stream", "find_streams", "watched"]

# Squares of relative errors that may be rounding: of a change, and of the stream itself, by dtype.
ROUNDING = {torch.float64: (1e-12, 1e-6), torch.float32: (1e-6, 1e-6)}
COARSE = (3e-3, 1e-4)  # bfloat16 and float16
LACKING = 4.0  # times; smaller factors are not worth a second pass
Place = tuple[str, int | None]


@dataclass(frozen=True)
class Stream:
    """A place where the stream can be read after a projection has written to it.

    Attributes:
        module: Name of the module whose input it is, at its `call`-th call, or whose output it is.
        call: From 0; None for the output.
        scale: `d stream / d y` of each feature, `[out_features]`, in float64.
    """

    module: str
    call: int | None
    scale: Tensor


@contextmanager
def watched(model: nn.Module, stream: Stream, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows the stream of a pass to `see`, which may end the pass there."""
    calls = 0

    def output(value: Any) -> None:
        found = first_tensor(value)
        assert found is not None
        see(found)

    def input_(x: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == (stream.call or 0) + 1:
            see(x)

    module = model.get_submodule(stream.module)
    with hooked(after={module: output}) if stream.call is None else hooked(before={module: input_}):
        yield


def find_streams(model: nn.Module, route: Route, batch: Batch) -> dict[str, Stream]:
    """For linears that write a residual stream, the first place in their block that is `residual + scale * y`.

    Others are left out: a linear that shares its input or is called several times, one whose output is used otherwise,
    and one that a norm or a permutation of the tokens follows.

    Args:
        model: The model, in evaluation mode.
        route: Where its linears are.
        batch: A few examples are enough.
    """
    streams: dict[str, Stream] = {}
    for block in route.blocks:
        alone = [stage[0] for stage in block.stages if len(stage) == 1 and stage[0] != block.name]
        alone = [name for name in alone if name not in route.repeated]
        for name in alone:
            if (stream := _find(model, block.name, name, batch)) is not None:
                streams[name] = stream
    return streams


def _find(model: nn.Module, block: str, name: str, batch: Batch) -> Stream | None:
    output, places = _observe(model, block, name, batch, None)
    finite = output[output.isfinite().all(-1)]  # padding may be anything
    if not len(finite):
        return None
    spread = finite.float().std(correction=0).clamp_min(1e-6).to(output)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output) * spread
    probes = [_Probe(output, noise, _observe(model, block, name, batch, noise)[1])]
    # A stream that is large beside what is written to it rounds small changes away; large ones it shows.
    if (factor := probes[0].lacking(places)) > LACKING:
        noise = noise * factor
        probes.append(_Probe(output, noise, _observe(model, block, name, batch, noise)[1]))
    for place, before in places.items():
        for probe in probes:
            if (scale := probe.scale_at(place, before)) is not None:
                return Stream(*place, scale)
    return None


class _Probe:
    """What followed when noise was added to the output of a linear."""

    def __init__(self, output: Tensor, noise: Tensor, moved: dict[Place, Tensor]) -> None:
        self.moved, self.largest = moved, torch.finfo(output.dtype).max
        self.finite = output.isfinite().all(-1).flatten()
        self.output = self._rows(output)
        self.noise = self._rows(output + noise) - self.output  # as it was rounded

    def lacking(self, places: dict[Place, Tensor]) -> float:
        """How much larger the noise should be, for the change at every place to be as large as what is there."""
        changes = [(self._rows(before), self._change(place, before)) for place, before in places.items()]
        factors = [float(before.norm() / change.norm()) for before, change in changes if change is not None]
        limit = self.largest / 2**8 / max(float(self.noise.abs().max()), torch.finfo(torch.float32).tiny)
        return min(max((each for each in factors if math.isfinite(each)), default=1.0), limit)

    def scale_at(self, place: Place, before: Tensor) -> Tensor | None:
        """`d stream / d y` of each feature, if a place is `residual + scale * y` with a residual."""
        change = self._change(place, before)
        if change is None:
            return None
        linear, residual = ROUNDING.get(before.dtype, COARSE)
        scale = (change * self.noise).sum(0) / self.noise.square().sum(0)
        if not _energy(change - scale * self.noise) <= linear * _energy(change) > 0:
            return None
        stream = self._rows(before)
        return scale if _energy(stream - scale * self.output) > residual * _energy(stream) else None

    def _change(self, place: Place, before: Tensor) -> Tensor | None:
        moved = self.moved.get(place)
        return None if moved is None or moved.shape != before.shape else self._rows(moved) - self._rows(before)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.double().flatten(0, -2)[self.finite]


def _energy(values: Tensor) -> float:
    return float(values.square().sum())


def _observe(
    model: nn.Module, block: str, name: str, batch: Batch, noise: Tensor | None
) -> tuple[Tensor, dict[Place, Tensor]]:
    """The output of a linear, and what follows it in its block in the same shape; with noise added to that output."""
    found: list[Tensor] = []
    places: dict[Place, Tensor] = {}
    calls: dict[str, int] = {}

    def linear_output(y: Tensor) -> Tensor | None:
        found.append(y.clone())  # as the stream's copy below
        return None if noise is None else y + noise

    def saw(module: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            call = calls[module] = calls.get(module, -1) + 1
            if found and x.shape == found[0].shape:
                places[module, call] = x.clone()  # it may be changed in place later

        return see

    def block_output(value: Any) -> None:
        x = first_tensor(value)
        if x is not None and x.shape == found[0].shape:
            places[block, None] = x.clone()
        raise Finish

    linear, outer = model.get_submodule(name), model.get_submodule(block)
    inside = {module: f"{block}.{child}" for child, module in outer.named_modules() if child and module is not linear}
    with (
        hooked(after={linear: linear_output, outer: block_output}),
        hooked(before={module: saw(module_name) for module, module_name in inside.items()}),
    ):
        run(model, batch)
    return found[0], places
