"""Fits layer after layer, each on the inputs that it gets from the model converted so far.

Errors of the layers before thus reach the fit, which can mend them: a linear's targets are the outputs of the dense
model, and where it writes the residual stream, the stream of the dense model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch, Batches, few_examples
from kron_hf.calibration.dense_targets import DenseTargets, keeping
from kron_hf.calibration.moments import Covariances, Moments
from kron_hf.calibration.passes import hooked, run
from kron_hf.calibration.route import Block, Route, linear_of
from kron_hf.calibration.sides import Side, beginning
from kron_hf.calibration.streams import Stream, watched
from kron_hf.calibration.token_weights import TokenWeights, no_weights
from kron_hf.evaluation_mode import evaluation

__all__ = ["Fitting", "Problem", "calibrate_in_order", "fitted_to"]


@dataclass(frozen=True)
class Problem:
    """What is to be fitted in place of one linear.

    Attributes:
        name: The linear's name.
        linear: The linear.
        covariances: Of its inputs in the model converted so far, and of the wanted outputs.
        output_weights: How much each output feature counts, `[out_features]`; None is all alike.
    """

    name: str
    linear: nn.Linear
    covariances: Covariances
    output_weights: Tensor | None

    @property
    def moments(self) -> Covariances:
        """The covariances that a fit is made to: `fitted_to` of the linear."""
        return fitted_to(self.linear, self.covariances)

    def weights_like(self, other: Tensor) -> Tensor | None:
        """The output weights in the dtype and on the device of another tensor."""
        return None if self.output_weights is None else self.output_weights.to(other)


def fitted_to(linear: nn.Linear, covariances: Covariances) -> Covariances:
    """About the means, or about zero for a linear without a bias; in float32, but for a linear in float64.

    On activations of a ViT both dtypes gave fits of the same error (to 1e-5), and float32 takes half the time.
    """
    covariances = covariances if linear.bias is not None else covariances.about_zero()
    return covariances if linear.weight.dtype == torch.float64 else covariances.to(dtype=torch.float32)


# The layer that takes the place of a linear; None leaves it as it is.
Fitting = Callable[[Problem], nn.Module | None]


def calibrate_in_order(
    model: nn.Module,
    route: Route,
    batches: Batches,
    fitting: Fitting,
    *,
    streams: Mapping[str, Stream] | None = None,
    token_weights: Mapping[str, TokenWeights] | None = None,
) -> Iterator[str]:
    """Fits the linears of a route in their order, and yields the name of each when it is done.

    The model itself is not changed: `fitting` keeps the layers. Between two names it is in its own state, so that a
    caller may stop at any time.

    Args:
        model: The dense model.
        route: What `find_route` found.
        batches: The calibration data.
        fitting: Makes the layer of each problem.
        streams: Of the linears whose targets shall mend the residual stream.
        token_weights: How much each row counts, by the first name of a stage; those of stages without all alike.

    Raises:
        ValueError: Activations are not finite.
    """
    walk = _Walk(model, route, batches, fitting, streams or {}, token_weights or {})
    with evaluation(model):
        walk.start(few_examples(next(iter(batches))))
    for block in route.blocks:
        with evaluation(model):
            walk.dense.enter(block)
        for stage in block.stages:
            with evaluation(model):
                walk.fit(stage)
            yield from stage
        with evaluation(model):
            walk.leave(block)


@dataclass
class _Walk:
    model: nn.Module
    route: Route
    batches: Batches
    fitting: Fitting
    streams: Mapping[str, Stream]
    token_weights: Mapping[str, TokenWeights]
    layers: dict[str, nn.Module] = field(default_factory=dict)

    def start(self, few: Batch) -> None:
        begin = beginning(self.model, self.route, few)
        self.dense = DenseTargets(self.model, self.route, self.batches, self.streams, begin, few)
        self.converted = Side(self.model, self.batches, self.layers, begin)

    def fit(self, stage: tuple[str, ...]) -> None:
        linears = {name: linear_of(self.model, name) for name in stage}
        stream = self.streams.get(stage[0])
        moments, weigh = _moments_of(linears), self.token_weights.get(stage[0], no_weights)
        for index, batch in enumerate(self.batches):
            for x, targets in self._calls(index, batch, stage, stream):
                weights = weigh(batch, x)
                rows = [target.reshape(-1, target.shape[-1]) for target in targets]
                try:
                    moments.update(x.reshape(-1, x.shape[-1]), torch.cat(rows, -1), weights)
                except ValueError as error:
                    raise ValueError(f"{', '.join(stage)}: {error}") from None
        weights = None if stream is None else stream.scale.square()
        sizes = [linear.out_features for linear in linears.values()]
        for (name, linear), covariances in zip(linears.items(), moments.result().split(sizes), strict=True):
            layer = self.fitting(Problem(name, linear, covariances, weights))
            if layer is not None:
                self.layers[name] = layer

    def leave(self, block: Block) -> None:
        self.dense.leave(block)
        self.converted.finish(block.name)

    def _calls(
        self, index: int, batch: Batch, stage: tuple[str, ...], stream: Stream | None
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The input of each call, and the targets of the linears."""
        if stage[0] in self.route.repeated:
            yield from self._repeated(index, batch, stage[0])
        elif stream is not None:
            yield self._stream_targets(index, batch, stage[0], stream)
        else:
            yield self._targets(index, batch, stage)

    def _repeated(self, index: int, batch: Batch, name: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        linear = linear_of(self.model, name)
        with self.dense.side.at(index), hooked(after={linear: lambda y: outputs.append(y.clone())}):
            run(self.model, batch)
        with self.converted.at(index), hooked(before={linear: lambda x: inputs.append(x.clone())}):
            run(self.model, batch)
        return zip(inputs, ([y] for y in outputs), strict=True)

    def _targets(self, index: int, batch: Batch, stage: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        return self._input(index, batch, stage[0]), self.dense.wanted(index, batch, stage)

    def _input(self, index: int, batch: Batch, name: str) -> Tensor:
        inputs: dict[str, Tensor] = {}
        with self.converted.at(index), hooked(before={linear_of(self.model, name): keeping(inputs, name, name)}):
            run(self.model, batch)
        return inputs[name]

    def _stream_targets(self, index: int, batch: Batch, name: str, stream: Stream) -> tuple[Tensor, list[Tensor]]:
        """The linear's own output in the converted model, and what the stream lacks there, in the linear's units."""
        (wanted,) = self.dense.wanted(index, batch, (name,))
        kept: dict[str, Tensor] = {}
        linear = linear_of(self.model, name)
        with (
            self.converted.at(index),
            hooked(before={linear: keeping(kept, "x")}, after={linear: keeping(kept, "y")}),
            watched(self.model, stream, keeping(kept, "converted", "converted")),
        ):
            run(self.model, batch)
        dtype = torch.promote_types(kept["y"].dtype, torch.float32)
        lacking = wanted.to(dtype) - kept["converted"].to(dtype)
        scale = stream.scale
        usable = scale.abs() > 1e-6 * scale.abs().max()
        mended = lacking / torch.where(usable, scale, torch.inf).to(dtype)
        return kept["x"], [kept["y"].to(dtype) + mended]


def _moments_of(linears: Mapping[str, nn.Linear]) -> Moments:
    first = next(iter(linears.values()))
    return Moments(
        first.in_features, sum(linear.out_features for linear in linears.values()), device=first.weight.device
    )
