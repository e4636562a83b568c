"""What the linears of a block shall give: the outputs of the dense model, or its residual stream after them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

from kron_hf.calibration.batches import Batch, Batches, example_count
from kron_hf.calibration.passes import Finish, hooked, run
from kron_hf.calibration.route import Block, Route
from kron_hf.calibration.sides import Beginning, Side
from kron_hf.calibration.streams import Stream, watched

__all__ = ["DenseTargets", "keeping"]

MEMORY = 2**31  # bytes that the targets of a block may take; beyond it there is a pass for each of its stages


class DenseTargets:
    """The dense model of a calibration.

    Args:
        model: The module tree.
        route: Its linears.
        batches: The data.
        streams: Of the linears whose stream is wanted.
        begin: Where passes may begin.
        few: A few examples.
    """

    def __init__(
        self,
        model: nn.Module,
        route: Route,
        batches: Batches,
        streams: Mapping[str, Stream],
        begin: Beginning,
        few: Batch,
    ) -> None:
        self.model, self.batches, self.streams = model, batches, streams
        self.side = Side(model, batches, {}, begin)
        self._numbers = _numbers_per_example(model, route, few)
        self._examples = len(batches) * example_count(next(iter(batches)))
        self._collected: list[dict[str, Tensor]] | None = None  # of each batch

    def enter(self, block: Block) -> None:
        """Collects what is wanted in a block in one pass of all data, if that is not too much."""
        numbers = sum(self._numbers[name] for stage in block.stages for name in stage)
        collected: list[dict[str, Tensor]] = []

        @contextmanager
        def collecting(index: int) -> Iterator[None]:
            collected.append({})
            with ExitStack() as stack:
                for stage in block.stages:
                    stack.enter_context(self._seeing(stage, collected[-1]))
                yield
            collected[-1] = {name: value.cpu() for name, value in collected[-1].items()}

        if self.side.keeps and numbers * self._examples * next(self.model.parameters()).element_size() <= MEMORY:
            self.side.finish(block.name, collecting)
            self._collected = collected if self.side.keeps else None

    def leave(self, block: Block) -> None:
        """Goes on to the next block."""
        if self._collected is None:
            self.side.finish(block.name)
        self._collected = None

    def wanted(self, index: int, batch: Batch, stage: tuple[str, ...]) -> list[Tensor]:
        """Of each linear of a stage, for one batch; asked for once."""
        if self._collected is not None:
            device = next(self.model.parameters()).device
            return [self._collected[index].pop(name).to(device) for name in stage]
        found: dict[str, Tensor] = {}
        with self.side.at(index), self._seeing(stage, found, stage[-1]):
            run(self.model, batch)
        return [found[name] for name in stage]

    def _seeing(self, stage: tuple[str, ...], into: dict[str, Tensor], last: str = "") -> AbstractContextManager[None]:
        if (stream := self.streams.get(stage[0])) is not None:
            return watched(self.model, stream, keeping(into, stage[0], last))
        return hooked(after={self.model.get_submodule(name): keeping(into, name, last) for name in stage})


def keeping(into: dict[str, Tensor], name: str, last: str = "") -> Callable[[Tensor], None]:
    """A hook that keeps what it sees, and ends the pass if `name` is the last to be seen."""

    def see(value: Tensor) -> None:
        into[name] = value.clone()  # it may be changed in place later
        if name == last:
            raise Finish

    return see


def _numbers_per_example(model: nn.Module, route: Route, batch: Batch) -> dict[str, float]:
    """How many numbers each linear gives for an example."""
    names = [name for block in route.blocks for stage in block.stages for name in stage]
    counts = dict.fromkeys(names, 0.0)

    def count(name: str) -> Callable[[Tensor], None]:
        def see(output: Tensor) -> None:
            counts[name] += output.numel() / example_count(batch)

        return see

    with hooked(after={model.get_submodule(name): count(name) for name in names}):
        run(model, batch)
    return counts
