"""How the features of a model depend on what its linears give, to first order: the mean squared gradients.

An error e of a linear's output moves the features by `J e`. For a random v of independent entries with mean 0 and
variance 1, `E_v (v^T J e)^2 = |J e|^2`, so the squares of the gradients of `v^T f`, which one backward pass gives for
all linears at once, tell how much each token and each output feature counts (Hutchinson, 1990). What is left out is
that errors of several outputs can cancel or add up.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch, example_count, real_tokens, split_examples
from kron_hf.calibration.decoder import DECODER_MASK
from kron_hf.calibration.passes import Finish, all_tensors, hooked, run
from kron_hf.calibration.route import linear_of

__all__ = ["OutputGradients", "output_gradients"]

EXAMPLES = 128  # to average over
TOGETHER = 8  # examples of a backward pass, whose memory grows with them


@dataclass(frozen=True)
class OutputGradients:
    """Mean squared gradients of a model's features by the output of one linear, over the variance of the features.

    Attributes:
        outputs: By output feature, summed over the rows of an example: `[out]`. Its product with the squared errors of
            the output features is, to first order, the relative squared error of the model's features.
        first: At the first token of an example, summed over the output features.
        others: The same at one other token, on average; both are None where outputs are not `[examples, tokens, out]`.
    """

    outputs: Tensor
    first: float | None
    others: float | None


@torch.enable_grad()
def output_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    features: nn.Module,
    first_token_alone: bool = False,
) -> dict[str, OutputGradients]:
    """Averages over the first examples; leaves the model as it is.

    Args:
        model: The model, in evaluation mode.
        names: Of the linears.
        batches: The calibration data.
        features: The module whose output tensors are the features, such as the backbone of a classifier; the model
            itself, if it does not call it. A linear is judged by the first of them that depends on it.
        first_token_alone: Whether features `[examples, tokens, ...]` are read at their first token only.

    Raises:
        ValueError: The output holds no floating point tensor, or a gradient is not finite.
    """
    generators: dict[int, torch.Generator] = {}
    spreads: dict[int, _Spread] = {}
    sums: dict[str, dict[int, _Sums]] = {name: {} for name in names}
    examples = 0
    for batch in _some(batches):
        outputs, found = _forward(model, names, batch, features)
        if not found:
            raise ValueError(
                f"{type(model).__name__}: its output holds no floating point tensor, so nothing tells how much an "
                "error matters; give block_size and rank in place of a budget"
            )
        if first_token_alone:
            found = [each[:, 0] if each.ndim == 3 else each for each in found]
        for index, feature in enumerate(found):
            spreads.setdefault(index, _Spread()).add(feature, batch)
            generators.setdefault(index, torch.Generator("cpu").manual_seed(index))
        signs = [_random_signs(feature, batch, generators[index]) for index, feature in enumerate(found)]
        for index, name, gradient in _gradients(outputs, found, signs):
            sums[name].setdefault(index, _Sums(name)).add(gradient, batch)
        examples += example_count(batch)
    variances = {index: spread.total / examples for index, spread in spreads.items()}
    return {name: _mean(model, name, own, variances, examples) for name, own in sums.items()}


def _some(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Few examples at a time, until there have been enough."""
    seen = 0
    for batch in batches:
        for part in split_examples(batch, TOGETHER):
            yield part
            seen += example_count(part)
            if seen >= EXAMPLES:
                return


def _forward(
    model: nn.Module, names: Sequence[str], batch: Batch, features: nn.Module
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """The outputs of every call of the linears, and the features that come of them."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def replace(output: Tensor) -> Tensor:
            kept = output if output.requires_grad else output.detach().requires_grad_()
            outputs[name].append(kept)
            return kept.clone()  # what follows may change it in place

        return replace

    with hooked(after={model.get_submodule(name): keep(name) for name in names}):
        return outputs, _features(model, batch, features)


def _features(model: nn.Module, batch: Batch, module: nn.Module) -> list[Tensor]:
    """The floating point tensors that a module in a model gives for a batch; the model, if it does not call it."""
    found: list[Any] = []

    def see(output: Any) -> None:
        found.append(output)
        raise Finish

    with hooked(after={module: see}):
        output = run(model, batch, with_graph=True)
    tensors = all_tensors(found[0] if found else output)
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim]


def _gradients(
    outputs: dict[str, list[Tensor]], features: Sequence[Tensor], signs: Sequence[Tensor]
) -> Iterator[tuple[int, str, Tensor]]:
    """Of random sums of each feature, by the outputs on which none before it depends: number, linear, gradient."""
    pending = set(outputs)
    for index, (feature, along) in enumerate(zip(features, signs, strict=True)):
        calls = [(name, output) for name, own in outputs.items() if name in pending for output in own]
        if not calls or not feature.requires_grad:
            continue
        found = torch.autograd.grad(
            feature, [output for _, output in calls], along, retain_graph=True, allow_unused=True
        )
        for (name, _), gradient in zip(calls, found, strict=True):
            if gradient is not None and bool(gradient.any()):
                pending.discard(name)
                yield index, name, gradient


def _random_signs(feature: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """1 or -1 for each number, 0 for padding; those of an example do not depend on how examples are batched."""
    drawn = [torch.randint(2, feature.shape[1:], generator=generator, device="cpu") for _ in range(len(feature))]
    signs = (torch.stack(drawn) * 2 - 1).to(feature)
    padding = _padding(batch, feature)
    return signs if padding is None else signs.masked_fill(padding[..., None], 0)


def _padding(batch: Batch, tokens: Tensor) -> Tensor | None:
    """Which of the tokens `[examples, tokens, features]` are padding; None without a mask that tells."""
    masks = [real_tokens(batch, tokens.shape[:2], name) for name in ("attention_mask", DECODER_MASK)]
    known = [mask for mask in masks if mask is not None]
    return known[0] == 0 if tokens.ndim == 3 and len(known) == 1 else None


class _Spread:
    """The summed variance of a feature `[..., features]` over its rows, times their number; without padding."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums = self.squares = torch.zeros((), device="cpu")

    def add(self, feature: Tensor, batch: Batch) -> None:
        values, padding = (feature if feature.ndim > 1 else feature[:, None]).detach(), _padding(batch, feature)
        values = values.double().flatten(0, -2) if padding is None else values[~padding].double()
        values = values.cpu()
        self.rows += len(values)
        self.sums = self.sums + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    @property
    def total(self) -> float:
        return float((self.squares - self.sums.square() / self.rows).clamp_min(0).sum())


class _Sums:
    """Of the squared gradients by the output of one linear."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outputs: Tensor | None = None
        self.first = self.others = 0.0
        self.firsts = self.rest = 0  # how many tokens that were

    def add(self, gradient: Tensor, batch: Batch) -> None:
        padding = _padding(batch, gradient)
        squares = gradient.double().square()
        squares = (squares if padding is None else squares.masked_fill(padding[..., None], 0)).cpu()
        if not bool(squares.isfinite().all()):
            raise ValueError(f"{self.name}: the gradients of the model's features by its outputs must be finite")
        by_output = squares.flatten(0, -2).sum(0)
        self.outputs = by_output if self.outputs is None else self.outputs + by_output
        if squares.ndim == 3 and len(squares) == example_count(batch) and squares.shape[1] > 1:
            self.first += float(squares[:, 0].sum())
            self.others += float(squares[:, 1:].sum())
            self.firsts += len(squares)
            self.rest += (squares.shape[:2].numel() if padding is None else int((~padding).sum())) - len(squares)


def _mean(
    model: nn.Module, name: str, sums: dict[int, _Sums], variances: dict[int, float], examples: int
) -> OutputGradients:
    if not sums:
        return OutputGradients(
            torch.zeros(linear_of(model, name).out_features, dtype=torch.float64, device="cpu"), None, None
        )
    index = min(sums)
    own, variance = sums[index], variances[index] or 1.0
    assert own.outputs is not None
    outputs = own.outputs / examples / variance
    if not own.firsts or not own.rest:
        return OutputGradients(outputs, None, None)
    return OutputGradients(outputs, own.first / own.firsts / variance, own.others / own.rest / variance)
