"""The two models of a calibration, the dense one and the one converted so far, and passes that begin in the middle.

Both are the same module tree: for a pass through the converted model its new layers take the places of the linears.
A pass need not compute the blocks that are finished: the last of them gives back the output that it gave before, and
those ahead of it, and what comes before all blocks (embeddings), something of the same shape, which nobody looks at
(`beginning` makes sure of that).
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import Finish, hooked, run, skipped, swapped
from kron_hf.calibration.route import Route

__all__ = ["Beginning", "Side", "beginning"]

MEMORY = 2**32  # bytes that the kept outputs of one side may take


@dataclass(frozen=True)
class Beginning:
    """Where passes may begin.

    Attributes:
        anywhere: Whether at the end of any block; else with the inputs.
        ahead: Modules before all blocks whose outputs no block but the first needs.
    """

    anywhere: bool
    ahead: tuple[str, ...] = ()


class Side:
    """One of the two models.

    Args:
        model: The module tree.
        batches: The data.
        layers: What takes the place of linears by name; may grow.
        begin: Where passes may begin; if anywhere, outputs of finished blocks are kept.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], layers: Mapping[str, nn.Module], begin: Beginning
    ) -> None:
        self.model, self.batches, self.layers = model, batches, layers
        self.keeps, self._ahead = begin.anywhere, begin.ahead
        self._finished: list[dict[str, Any]] = []  # of each batch, what the finished blocks give back
        self._last: str | None = None

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """The model ready for a pass with batch number `index`."""
        outputs = self._finished[index] if self._last is not None else {}
        if self._last is not None:
            outputs = outputs | {self._last: _map(outputs[self._last], self._back)}
        with swapped(self.model, self.layers), skipped(self.model, outputs):
            yield

    def finish(self, block: str, watching: Callable[[int], AbstractContextManager[None]] | None = None) -> None:
        """Runs all batches to the end of a block and keeps what it gives; `watching` is around the pass of a batch."""
        if not self.keeps:
            return
        kept = 0
        for index, batch in enumerate(self.batches):
            with nullcontext() if watching is None else watching(index):
                output, ahead = self._output(block, index, batch)
            if index == 0 and not _is_plain(output):
                self.keeps = False
                return
            before = self._finished[index] if index < len(self._finished) else ahead
            if self._last is not None:
                before = {**before, self._last: _map(before[self._last], _shape_alone)}
            kept += _size(output)
            entry = before | {block: _map(output, _to_memory)}
            self._finished[index : index + 1] = [entry]
            if kept > MEMORY:
                self._give_up()
                return
        self._last = block

    def _output(self, block: str, index: int, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """What a block gives, and the shapes of what comes before all blocks."""
        found: list[Any] = []
        ahead: dict[str, Any] = {}

        def see(output: Any) -> None:
            found.append(output)
            raise Finish

        def note(name: str) -> Callable[[Any], None]:
            return lambda output: ahead.update({name: _map(output, _shape_alone)})

        names = self._ahead if self._last is None else ()
        after = {self.model.get_submodule(name): note(name) for name in names}
        with self.at(index), hooked(after={**after, self.model.get_submodule(block): see}):
            run(self.model, batch)
        return found[0], ahead

    def _back(self, kept: Tensor) -> Tensor:
        # A copy: what follows may change it in place.
        return kept.to(next(self.model.parameters()).device, copy=True)

    def _give_up(self) -> None:
        warnings.warn(
            f"calibration keeps outputs of at most {MEMORY / 2**30:.0f} GiB; beyond that every pass begins with the "
            "inputs, which takes longer. Fewer calibration examples would do as well",
            stacklevel=2,
        )
        self.keeps, self._last = False, None
        self._finished.clear()


def beginning(model: nn.Module, route: Route, batch: Batch) -> Beginning:
    """Where a pass may begin so that every later layer gets the input of a whole pass, to the bit.

    Not at the end of a block where a layer further on reads the output of an earlier one, as the decoder does of the
    encoder; with the embeddings where layers further on read those, too.

    Args:
        model: The model, in evaluation mode.
        route: Its blocks.
        batch: A few examples are enough.
    """
    if not route.in_turn:
        return Beginning(anywhere=False)
    ahead = _outputs_ahead(model, route, batch)
    if ahead and _begins_anywhere(model, route, batch, ahead):
        return Beginning(anywhere=True, ahead=tuple(ahead))
    return Beginning(anywhere=_begins_anywhere(model, route, batch, {}))


def _outputs_ahead(model: nn.Module, route: Route, batch: Batch) -> dict[str, Any]:
    """The outputs, in shape, of the outermost modules that are done before the first block begins."""
    outputs: dict[str, Any] = {}

    def note(name: str) -> Callable[[Any], None]:
        return lambda output: outputs.update({name: _map(output, _shape_alone) if _is_plain(output) else ...})

    def stop(x: Tensor) -> None:
        raise Finish

    after = {module: note(name) for name, module in model.named_modules() if name}
    with hooked(before={model.get_submodule(route.blocks[0].name): stop}, after=after):
        run(model, batch)
    outermost = {name: output for name, output in outputs.items() if not _inside(name, outputs)}
    return {name: output for name, output in outermost.items() if output is not ...}


def _inside(name: str, others: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in others for length in range(1, len(parts)))


def _begins_anywhere(model: nn.Module, route: Route, batch: Batch, ahead: dict[str, Any]) -> bool:
    linears = {stage[0]: model.get_submodule(stage[0]) for block in route.blocks for stage in block.stages}
    blocks = {block.name: model.get_submodule(block.name) for block in route.blocks}
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    after = {module: _keeping(outputs, name) for name, module in blocks.items()}
    with hooked(before={module: _keeping(inputs, name) for name, module in linears.items()}, after=after):
        run(model, batch)
    if outputs.keys() != blocks.keys() or not all(map(_is_plain, outputs.values())):
        return False  # such as a ModuleList, which is not called
    done = dict(ahead)
    for index, block in enumerate(route.blocks[:-1]):
        done = {name: _map(output, _shape_alone) for name, output in done.items()} | {block.name: outputs[block.name]}
        later = [stage[0] for other in route.blocks[index + 1 :] for stage in other.stages]
        same: dict[str, bool] = {}
        checks = {linears[name]: _comparing(same, name, inputs[name]) for name in later}
        with skipped(model, done | {block.name: _map(outputs[block.name], Tensor.clone)}), hooked(before=checks):
            run(model, batch)
        if not all(same.get(name, False) for name in later):
            return False
    return True


def _keeping(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    def see(value: Any) -> None:
        into[name] = _map(value, Tensor.clone)

    return see


def _comparing(into: dict[str, bool], name: str, wanted: Tensor) -> Callable[[Tensor], None]:
    def see(value: Tensor) -> None:
        into[name] = torch.equal(value, wanted)

    return see


def _is_plain(output: Any) -> bool:
    """Whether an output is a tensor, or a tuple or list that holds nothing but tensors and None."""
    if isinstance(output, tuple | list):
        return type(output) in (tuple, list) and all(_is_plain(value) for value in output)
    return output is None or isinstance(output, Tensor)


def _map(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple | list):
        return type(output)(_map(value, change) for value in output)
    return output


def _shape_alone(tensor: Tensor) -> Tensor:
    """A tensor of zeros of the same shape that takes no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _to_memory(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _size(output: Any) -> int:
    if isinstance(output, tuple | list):
        return sum(_size(value) for value in output)
    return output.numel() * output.element_size() if isinstance(output, Tensor) else 0
