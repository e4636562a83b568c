"""The l1 penalty on S as a proximal step, preconditioned like the optimizer's own, and what keeps it honest.

The objective is `task loss + (l1 / n) * sum_layers ||S||_1` with n the number of entries of S over all layers, so `l1`
weighs the mean of |s|; the paper's lambda is `l1 / n`. The penalty never enters the loss. After a step in which the
optimizer multiplied the gradient of an entry by `step_size` (`lr`, or `lr / (sqrt(v_hat) + eps)` under Adam), the
proximal map of the penalty in that metric is the soft threshold of that entry at `step_size * l1 / n`. It is
elementwise: nothing is communicated, and zeros are exact. With a `group_penalty` a group soft threshold of whole rows
or columns of S follows (`kron_hf.sparsity.groups`): exact zeros again; FSDP2 adds one all-reduce for its columns.

S -> S / c, A_i -> c * A_i leaves W unchanged and would let the optimizer escape: it lowers the penalty at no cost. So
every `interval` steps the scale of each block's `sum_i a_i B_i` is measured; where its root mean square has left
`(r / 2, 2 r)`, r being the layer's at the start, a power of two moves from A into S. W keeps every bit, the state of
the optimizer follows, and |s_jl| is, within a factor of two, the block's root mean square in units of r. So the penalty
is one on the blocks of W, a group lasso, and a rescaling gains at most that factor.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from kron_hf.factors import block_norms
from kron_hf.kron_layer import KronLayer
from kron_hf.sharding import gather, local, shard_of, sum_over_shards
from kron_hf.sparsity.groups import REDUCED_DIMS, group_factor
from kron_hf.sparsity.optimizer_state import rescale_state, step_size
from kron_hf.sparsity.options import SparsityOptions
from kron_hf.sparsity.pruning import gather_factors, importance

__all__ = ["ProximalL1", "soft_threshold"]


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """`sign(x) * max(|x| - threshold, 0)`: the proximal map of `threshold * |x|`."""
    return x.sign() * (x.abs() - threshold).clamp_min(0.0)


class _Part(NamedTuple):
    """What this process holds of S of one layer, the step size of its entries, and which of them are exempt."""

    s: Tensor
    steps: Tensor | float
    kept: Tensor


class ProximalL1:
    """The l1 penalty of a training; `Sparsifier` calls it.

    In each layer the block of largest norm, chosen every `interval` steps, is not penalised, so no layer ever empties.

    Args:
        options: With an `l1`; `interval` is the optimizer steps between two choices of that block and rescalings.
    """

    def __init__(self, options: SparsityOptions) -> None:
        assert options.l1 is not None
        self._l1, self._interval, self._group_penalty = options.l1, options.interval, options.group_penalty
        self._dims = REDUCED_DIMS[options.groups] if options.group_penalty else ()
        self._references: list[float] | None = None  # r of each layer
        self._kept: list[int] = []  # flat index of each layer's unpenalised block
        self._kept_here: list[Tensor] = []  # the same as masks like local(S)

    def advance(
        self, layers: list[KronLayer], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> None:
        """After optimizer step number `step`: the proximal step, every `interval` steps a rescaling before it."""
        optimizer = _required(optimizer)
        if self._references is None or step % self._interval == 0:
            self._rescale(layers, always, optimizer)
        self._shrink(layers, optimizer)

    def finish(
        self, layers: list[KronLayer], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> list[Tensor]:
        """The last proximal step; blocks that the penalty alone would zero within `interval` more become zero, too.

        Returns:
            The zeros of S, masks `[O, I]`, the same on all processes.
        """
        optimizer = _required(optimizer)
        if self._references is None:
            self._rescale(layers, always, optimizer)
        self._shrink(layers, optimizer)
        parts, weight = self._parts(layers, optimizer), self._weight(layers)
        for s, steps, kept in parts:
            s.masked_fill_((s.abs() <= self._interval * self._entry_weight(weight) * steps) & ~kept, 0.0)
        for factors, (s, _, kept) in self._group_factors(layers, parts, self._interval * weight):
            s.masked_fill_((factors == 0) & ~kept, 0.0)
        dead = [s == 0 for s in gather([layer.s for layer in layers])]
        for mask, index, gone in zip(dead, self._kept, always, strict=True):
            mask.view(-1)[index] = gone is not None and bool(gone.view(-1)[index])
        return dead

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"references": self._references, "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any], layers: list[KronLayer]) -> None:
        """Continues from `state_dict`; `{}` begins afresh.

        Raises:
            ValueError: The state is malformed.
        """
        references, kept = state.get("references"), state.get("kept", [])
        _check_state(references, kept, layers)
        self._references, self._kept, self._kept_here = references, list(kept), []

    def _shrink(self, layers: list[KronLayer], optimizer: Optimizer) -> None:
        parts, weight = self._parts(layers, optimizer), self._weight(layers)
        for s, steps, kept in parts:
            s.copy_(torch.where(kept, s, soft_threshold(s, self._entry_weight(weight) * steps)))
        for factors, (s, _, kept) in self._group_factors(layers, parts, weight):
            s.copy_(torch.where(kept, s, s * factors))

    def _weight(self, layers: list[KronLayer]) -> float:
        return self._l1 / sum(layer.s.numel() for layer in layers)

    def _entry_weight(self, weight: float) -> float:
        return weight * (1 - self._group_penalty)

    def _parts(self, layers: list[KronLayer], optimizer: Optimizer) -> list[_Part]:
        if not self._kept_here:
            self._kept_here = [_one_true(layer, index) for layer, index in zip(layers, self._kept, strict=True)]
        return [
            _Part(local(layer.s), step_size(optimizer, layer.s), kept)
            for layer, kept in zip(layers, self._kept_here, strict=True)
        ]

    def _group_factors(
        self, layers: list[KronLayer], parts: list[_Part], weight: float
    ) -> Iterator[tuple[Tensor, _Part]]:
        """For rows, then columns: by what the group soft threshold multiplies S of each layer."""
        for dim in self._dims:
            squares = [_dual_squares(part).sum(dim, keepdim=True) for part in parts]
            squares = sum_over_shards(squares, [layer.s for layer in layers], dim)
            for layer, part, each in zip(layers, parts, squares, strict=True):
                size = layer.s.shape[dim] ** 0.5
                yield group_factor(each, weight * self._group_penalty / len(self._dims) * size), part

    def _rescale(self, layers: list[KronLayer], always: list[Tensor | None], optimizer: Optimizer) -> None:
        factors = gather_factors(layers)
        self._kept = [int(importance(*each, gone).argmax()) for each, gone in zip(factors, always, strict=True)]
        self._kept_here = []
        scales = [block_norms(torch.ones_like(s), a, b) for s, a, b in factors]
        if self._references is None:
            self._references = [float(scale.square().mean().sqrt()) for scale in scales]
        for layer, scale, reference in zip(layers, scales, self._references, strict=True):
            _move_scale(layer, _power_of_two(scale / reference), optimizer)


def _required(optimizer: Optimizer | None) -> Optimizer:
    if optimizer is None:
        raise TypeError("l1 reads the step sizes from the optimizer: call Sparsifier.step(optimizer)")
    return optimizer


def _check_state(references: object, kept: object, layers: list[KronLayer]) -> None:
    if references is None and kept == []:
        return
    if not isinstance(references, list) or not isinstance(kept, list) or len(references) != len(kept):
        raise ValueError("the sparsity state is malformed: references and kept must be lists of the same length")
    if len(kept) != len(layers):
        raise ValueError(f"the sparsity state has references of {len(kept)} layers, this model has {len(layers)}")
    for reference, index, layer in zip(references, kept, layers, strict=True):
        if type(reference) is not float or not math.isfinite(reference) or reference < 0:
            raise ValueError("the sparsity state is malformed: references must be finite floats that are not negative")
        if type(index) is not int or not 0 <= index < layer.s.numel():
            raise ValueError(f"the sparsity state is malformed: kept must name one of the {layer.s.numel()} blocks")


def _dual_squares(part: _Part) -> Tensor:
    """`(s / step_size) ** 2`, 0 where s is 0 or exempt, whatever the step size."""
    present = (part.s != 0) & ~part.kept
    return torch.where(present, part.s / part.steps, 0.0).square()


def _power_of_two(ratio: Tensor) -> Tensor:
    """The largest one not beyond the ratio, seen from 1: 1 for ratios in (1/2, 2), and where there is no scale."""
    exponent = ratio.log2().trunc()
    return torch.where(exponent.isfinite(), exponent, 0.0).exp2()


def _move_scale(layer: KronLayer, factor: Tensor, optimizer: Optimizer) -> None:
    """S * factor and A / factor, which leave W as it is, and the optimizer's state of both."""
    for parameter, by in ((layer.s, factor), (layer.a, (1 / factor).expand(layer.a.shape))):
        here = shard_of(by.to(parameter.dtype), parameter)
        local(parameter).mul_(here)
        rescale_state(optimizer, parameter, 1 / here)


def _one_true(layer: KronLayer, index: int) -> Tensor:
    mask = torch.zeros(layer.s.shape, dtype=torch.bool)
    mask.view(-1)[index] = True
    return shard_of(mask, layer.s)
