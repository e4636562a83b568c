"""The way of a forward pass through the linears to be fitted: in which order, in which blocks, with which inputs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import hooked, run

__all__ = ["Block", "Route", "find_route", "linear_of"]


@dataclass(frozen=True)
class Block:
    """A repeated part of the model, such as a transformer layer, that the pass leaves before it enters the next.

    Attributes:
        name: The module's name; of a linear outside of any such part, its own.
        stages: Names of the linears in it in the order of their calls; those of one stage have the same input.
    """

    name: str
    stages: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Route:
    """All blocks in their order.

    Attributes:
        blocks: Those that hold linears to be fitted.
        in_turn: Whether each block and linear is called once, and the blocks one after the other, so that a pass can
            begin at the end of a block.
        repeated: Names of the linears that one pass calls several times, as those that layers share.
    """

    blocks: tuple[Block, ...]
    in_turn: bool
    repeated: frozenset[str] = frozenset()


def find_route(model: nn.Module, names: Sequence[str], batch: Batch) -> Route:
    """Runs a batch and looks where it comes by.

    Raises:
        ValueError: Some of the linears are never called.
    """
    calls: list[tuple[str, bool]] = []  # name, and whether its input is that of the call before
    last: list[Tensor] = []

    def saw(name: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            calls.append((name, bool(last) and last[0] is x))
            last[:] = [x]

        return see

    modules = {name: model.get_submodule(name) for name in names}
    with hooked(before={module: saw(name) for name, module in modules.items()}):
        run(model, batch)
    order = list(dict.fromkeys(name for name, _ in calls))
    if unused := [name for name in names if name not in order]:
        raise ValueError(
            f"{', '.join(unused[:5])}{' and others' if len(unused) > 5 else ''}: the model does not use this layer for "
            "calibration_data, so it cannot be fitted; name it in exclude_modules, or give inputs that reach it"
        )
    return _route(model, order, calls)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """A linear of a route."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _route(model: nn.Module, order: list[str], calls: list[tuple[str, bool]]) -> Route:
    with_previous: dict[str, bool] = {}
    for name, same in calls:
        with_previous.setdefault(name, same)
    repeated = frozenset(name for name, count in Counter(name for name, _ in calls).items() if count > 1)
    owners = {name: _block_of(model, name) for name in order}
    blocks: list[tuple[str, list[list[str]]]] = []
    for name in order:
        if not blocks or blocks[-1][0] != owners[name]:
            blocks.append((owners[name], [[name]]))
        elif with_previous[name] and not repeated & {name, *blocks[-1][1][-1]}:
            blocks[-1][1][-1].append(name)
        else:
            blocks[-1][1].append([name])
    once = len(calls) == len(order) and len({name for name, _ in blocks}) == len(blocks)
    return Route(tuple(Block(name, tuple(map(tuple, stages))) for name, stages in blocks), once, repeated)


def _block_of(model: nn.Module, name: str) -> str:
    """The innermost module around a linear that stands in a list of modules; else the linear itself."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        parent = model.get_submodule(".".join(parts[: length - 1]))
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            return ".".join(parts[:length])
    return name
