"""The l1 penalty on S as a proximal step, preconditioned like the optimizer's own, and what keeps it honest.

The objective is `task loss + (l1 / n) * sum_layers ||S||_1` with n the number of entries of S over all layers, so `l1`
weighs the mean of |s|; the paper's lambda is `l1 / n`. The penalty never enters the loss. After a step in which the
optimizer multiplied the gradient of an entry by `step_size` (`lr`, or `lr / (sqrt(v_hat) + eps)` under Adam), the
proximal map of the penalty in that metric is the soft threshold of that entry at `step_size * l1 / n`. It is
elementwise: nothing is communicated, and zeros are exact.

S -> S / c, A_i -> c * A_i leaves W unchanged and would let the optimizer escape: it lowers the penalty at no cost. So
every `interval` steps the scale of each block's `sum_i a_i B_i` is measured; where its root mean square has left
`(r / 2, 2 r)`, r being the layer's at the start, a power of two moves from A into S. W keeps every bit, the state of
the optimizer follows, and |s_jl| is, within a factor of two, the block's root mean square in units of r. So the penalty
is one on the blocks of W, a group lasso, and a rescaling gains at most that factor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kron_hf.factors import block_norms
from kron_hf.layers import KronLinear
from kron_hf.sharding import gather, local, shard_of
from kron_hf.sparsity.optimizer_state import rescale_state, step_size
from kron_hf.sparsity.pruning import gather_factors, importance

__all__ = ["ProximalL1", "soft_threshold"]


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """`sign(x) * max(|x| - threshold, 0)`: the proximal map of `threshold * |x|`."""
    return x.sign() * (x.abs() - threshold).clamp_min(0.0)


class ProximalL1:
    """The l1 penalty of a training; `Sparsifier` calls it.

    In each layer the block of largest norm, chosen every `interval` steps, is not penalised, so no layer ever empties.

    Args:
        l1: Weight of the mean of |s|.
        interval: Optimizer steps between two choices of that block and rescalings.
    """

    def __init__(self, l1: float, interval: int) -> None:
        self._l1, self._interval = l1, interval
        self._references: list[float] | None = None  # r of each layer
        self._kept: list[int] = []  # flat index of each layer's unpenalised block
        self._kept_here: list[Tensor] = []  # the same as masks like local(S)

    def advance(
        self, layers: list[KronLinear], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> None:
        """After optimizer step number `step`: the proximal step, every `interval` steps a rescaling before it."""
        optimizer = _required(optimizer)
        if self._references is None or step % self._interval == 0:
            self._rescale(layers, always, optimizer)
        self._shrink(layers, optimizer)

    def finish(
        self, layers: list[KronLinear], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> list[Tensor]:
        """The last proximal step; blocks that the penalty alone would zero within `interval` more become zero, too.

        Returns:
            The zeros of S, masks `[O, I]`, the same on all processes.
        """
        optimizer = _required(optimizer)
        if self._references is None:
            self._rescale(layers, always, optimizer)
        self._shrink(layers, optimizer)
        for s, threshold, kept in self._thresholds(layers, optimizer):
            s.masked_fill_((s.abs() <= self._interval * threshold) & ~kept, 0.0)
        dead = [s == 0 for s in gather([layer.s for layer in layers])]
        for mask, index, gone in zip(dead, self._kept, always, strict=True):
            mask.view(-1)[index] = gone is not None and bool(gone.view(-1)[index])
        return dead

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"references": self._references, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; `{}` begins afresh."""
        self._references, self._kept, self._kept_here = state.get("references"), list(state.get("kept", [])), []

    def _shrink(self, layers: list[KronLinear], optimizer: Optimizer) -> None:
        for s, threshold, kept in self._thresholds(layers, optimizer):
            s.copy_(torch.where(kept, s, soft_threshold(s, threshold)))

    def _thresholds(
        self, layers: list[KronLinear], optimizer: Optimizer
    ) -> list[tuple[Tensor, Tensor | float, Tensor]]:
        """S, the threshold of each entry and whether it is exempt, of each layer, as far as this process holds it."""
        if not self._kept_here:
            self._kept_here = [_one_true(layer, index) for layer, index in zip(layers, self._kept, strict=True)]
        strength = self._l1 / sum(layer.s.numel() for layer in layers)
        return [
            (local(layer.s), strength * step_size(optimizer, layer.s), kept)
            for layer, kept in zip(layers, self._kept_here, strict=True)
        ]

    def _rescale(self, layers: list[KronLinear], always: list[Tensor | None], optimizer: Optimizer) -> None:
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


def _power_of_two(ratio: Tensor) -> Tensor:
    """The largest one not beyond the ratio, seen from 1: 1 for ratios in (1/2, 2), and where there is no scale."""
    exponent = ratio.log2().trunc()
    return torch.where(exponent.isfinite(), exponent, 0.0).exp2()


def _move_scale(layer: KronLinear, factor: Tensor, optimizer: Optimizer) -> None:
    """S * factor and A / factor, which leave W as it is, and the optimizer's state of both."""
    for parameter, by in ((layer.s, factor), (layer.a, (1 / factor).expand(layer.a.shape))):
        here = shard_of(by.to(parameter.dtype), parameter)
        local(parameter).mul_(here)
        rescale_state(optimizer, parameter, 1 / here)


def _one_true(layer: KronLinear, index: int) -> Tensor:
    mask = torch.zeros(layer.s.shape, dtype=torch.bool)
    mask.view(-1)[index] = True
    return shard_of(mask, layer.s)
