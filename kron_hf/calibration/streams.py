"""Where a projection writes into the residual stream, found by moving its output a little and looking what follows.

In a residual block `stream = residual + scale * y`, with y the projection's output and `scale` the LayerScale (one
without it). What the converted model gets wrong in `residual` the projection can mend, if its targets say so.
"""

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

# Of what follows, this share may be rounding: the square of a relative error, by dtype.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
COARSE = 3e-3  # bfloat16 and float16
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
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator).to(output) * output.float().std().clamp_min(1e-6).to(output)
    moved = _observe(model, block, name, batch, noise)[1]
    noise = noise.double().flatten(0, -2)
    tolerance = ROUNDING.get(output.dtype, COARSE)
    for place, before in places.items():
        if place not in moved or moved[place].shape != before.shape:
            continue
        change = (moved[place].double() - before.double()).flatten(0, -2)
        scale = (change * noise).sum(0) / noise.square().sum(0)
        changed = float(change.square().sum())
        if changed == 0 or float((change - scale * noise).square().sum()) > tolerance * changed:
            continue
        residual = before.double() - scale * output.double()
        if float(residual.square().sum()) > 1e-6 * float(before.double().square().sum()):
            return Stream(*place, scale)
    return None


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
