"""The inputs of all linears in the dense model, block by block: what the choice of shapes and ranks is made from."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch, example_count, few_examples
from kron_hf.calibration.moments import Covariances, Moments
from kron_hf.calibration.passes import Finish, hooked, run
from kron_hf.calibration.route import Block, Route, linear_of
from kron_hf.calibration.sides import Side, beginning
from kron_hf.calibration.token_weights import TokenWeights, no_weights
from kron_hf.evaluation_mode import evaluation

__all__ = ["Inputs", "walk_dense"]


@dataclass(frozen=True)
class Inputs:
    """Inputs of one linear in the dense model.

    Attributes:
        name: The linear's name.
        linear: The linear.
        fitting: Covariances with its outputs, of the examples to fit on.
        held_out: Of the examples that only judge; the same as `fitting` if there are too few examples to split.
    """

    name: str
    linear: nn.Linear
    fitting: Covariances
    held_out: Covariances


def walk_dense(
    model: nn.Module,
    route: Route,
    batches: Iterable[Batch],
    *,
    held_out: float = 0.25,
    token_weights: Mapping[str, TokenWeights] | None = None,
) -> Iterator[Inputs]:
    """Yields the inputs of the linears in the order of the route; memory is taken for one block at a time.

    Args:
        model: The dense model; between two linears it is in its own state.
        route: What `find_route` found.
        batches: The calibration data, read again and again.
        held_out: Share of the examples that are not fitted.
        token_weights: How much each row counts, by the first name of a stage; those of stages without all alike.

    Raises:
        ValueError: Activations are not finite.
    """
    with evaluation(model):
        side = Side(model, batches, {}, beginning(model, route, few_examples(next(iter(batches)))))
    for block in route.blocks:
        with evaluation(model):
            moments = _collect(model, side, block, route.repeated, held_out, token_weights or {})
        for stage in block.stages:
            fitting, held = (part.result() for part in moments.pop(stage[0]))
            for name in stage:
                linear = linear_of(model, name)
                weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
                yield Inputs(name, linear, fitting.linear(weight, bias), held.linear(weight, bias))
        with evaluation(model):
            side.finish(block.name)


def _collect(
    model: nn.Module,
    side: Side,
    block: Block,
    repeated: Set[str],
    held_out: float,
    token_weights: Mapping[str, TokenWeights],
) -> dict[str, tuple[Moments, Moments]]:
    """Moments of the inputs of each stage: of the examples to fit on, and of the others."""
    result: dict[str, tuple[Moments, Moments]] = {}
    seen = 0
    for stage in block.stages:
        linear = linear_of(model, stage[0])
        result[stage[0]] = (_moments(linear), _moments(linear))
    last = None if repeated else block.stages[-1][0]  # called again, later
    for index, batch in enumerate(side.batches):
        examples = example_count(batch)
        held = _held_out(seen, examples, held_out)
        seen += examples

        def saw(name: str, batch: Batch, held: Tensor) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                _add(result[name], name, x, held, token_weights.get(name, no_weights)(batch, x))
                if name == last:
                    raise Finish

            return see

        with (
            side.at(index),
            hooked(before={model.get_submodule(stage[0]): saw(stage[0], batch, held) for stage in block.stages}),
        ):
            run(model, batch)
    return {name: parts if parts[1].weight else (parts[0], parts[0]) for name, parts in result.items()}


def _add(moments: Sequence[Moments], name: str, x: Tensor, held: Tensor, weights: Tensor | None) -> None:
    weights = torch.ones(x.shape[:-1].numel(), dtype=torch.float64, device=x.device) if weights is None else weights
    rows = len(weights) // len(held)
    # Where an example's rows are not together, as in some windows, the split is one of rows.
    judges = (
        held.to(x.device).repeat_interleave(rows) if rows * len(held) == len(weights) else held[:1].expand(len(weights))
    )
    for part, chosen in zip(moments, (~judges, judges), strict=True):
        if bool(chosen.any()):
            try:
                part.update(x.reshape(-1, x.shape[-1])[chosen], None, weights[chosen])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _moments(linear: nn.Linear) -> Moments:
    return Moments(linear.in_features, 0, device=linear.weight.device)


def _held_out(seen: int, examples: int, share: float) -> Tensor:
    """Which of the next examples judge: as many as the share says, evenly spread; never the first."""
    count = torch.arange(seen, seen + examples + 1, dtype=torch.float64) * share
    return count.floor().diff() > 0
