"""Group LASSO over blocks, plain and elastic, as a proximal step in the optimizer's own metric.

The penalty on a layer is `lambda * sum_g sqrt(bo * bi) * ||W_g||_F`, for the elastic one plus `mu / 2 * ||W_g||_F^2`.
It never enters the loss. After a step in which the optimizer multiplied gradients by eta, the proximal map of the
penalty in that metric shrinks a block of root mean square rho by eta * lambda: `W_g <- W_g * max(0, 1 - eta_g *
lambda / rho_g) / (1 + eta_g * mu)`. Adam has an eta of each entry, and one with a value of its own in each block has
no closed form; eta_g is the harmonic mean over the block. Without that metric the penalty has a cliff: Adam's steps
are about as long in every block, so at some strength all of them vanish together.

lambda would depend on model, loss and learning rate. `strength` does not: it is the number of times that a block of
average norm and average eta would have vanished between `start` and `end`, had it no gradient.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kron_hf.baselines.block_layer import BlockLayer, Layers, block_rms, gather_weights, scale_blocks
from kron_hf.baselines.options import Checks, checked_number, schedule
from kron_hf.baselines.pruner import BlockPruner
from kron_hf.factors import to_blocks
from kron_hf.sharding import gather
from kron_hf.sparsity.masks import pack_mask, unpack_mask

__all__ = ["ElasticGroupLasso", "GroupLasso", "group_soft_threshold"]


def group_soft_threshold(norm: Tensor, threshold: Tensor) -> Tensor:
    """By what the proximal map of `threshold * ||w||` multiplies w, `max(0, 1 - threshold / norm)`; 0 where w is 0."""
    return torch.where(norm > threshold, 1 - threshold / norm, 0.0)


class GroupLasso(BlockPruner):
    """Group LASSO over blocks, then pruning to the target and a frozen mask.

    From `start` to `end` each optimizer step is followed by a proximal step of the penalty: a block of root mean
    square rho_g is multiplied by `max(0, 1 - tau_g / rho_g)` with `tau_g = strength * rho * omega_g / T`, where rho is
    that of the whole layer, T the steps from `start` to `end`, and omega_g the block's step size over the layer's mean
    under Adam (see `kron_hf.baselines.group_lasso`), 1 under other optimizers. Blocks may come back to life. At `end`
    the blocks of smallest norm, zeros first, make up the target, and the masks freeze.

    Too much strength neither overshoots the target nor empties a layer: the blocks that would survive if pruned to the
    target now, chosen every `interval` steps, are penalised but never vanish; they lose at most half of their norm
    until the next choice. See `BlockPruner` for what all baselines share.

    Args:
        layers: `{name: BlockLayer}`.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        total_steps: Optimizer steps of the whole training.
        strength: Weight of the penalty, see above; 0 is one-shot pruning at `end`. From 2 to 8 makes little difference.
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        start: Start of the penalty as a share of `total_steps`.
        end: Its end, where the masks freeze.
        interval: Optimizer steps between two choices of the blocks that must not vanish.

    Raises:
        TypeError: A layer is no `nn.Linear`.
        ValueError: An option is out of range, or layers, steps or target do not fit.
    """

    _CHECKS: ClassVar[Checks] = {"strength": checked_number}

    def __init__(
        self,
        layers: Layers,
        *,
        target_sparsity: float,
        total_steps: int,
        strength: float = 4.0,
        scope: str = "global",
        start: float = 0.05,
        end: float = 0.5,
        interval: int = 10,
    ) -> None:
        self.strength, self._l2 = checked_number("strength", strength), 0.0
        super().__init__(layers, schedule(target_sparsity, start, end, interval, scope), total_steps)
        self._kept: list[Tensor] | None = None  # blocks that must not vanish, [O, I] each

    def _update(self, step: int, optimizer: Optimizer) -> None:
        if self._kept is None or step % self.options.interval == 0:
            self._kept = [~mask for mask in self._choose(self.target_sparsity)]
        steps = self.end_step - self.start_step
        least = 0.5 ** (1 / self.options.interval)
        weights = gather_weights(self._layers)
        relative = _relative_step_sizes(optimizer, self._layers)
        for layer, weight, omega, kept in zip(self._layers, weights, relative, self._kept, strict=True):
            rms = block_rms(weight, layer)
            mean = rms.square().mean().sqrt()
            factor = group_soft_threshold(rms, self.strength / steps * mean * omega)
            factor = torch.where(kept, factor.clamp_min(least), factor)
            scale_blocks(layer, factor / (1 + self._l2 / steps * omega))

    def _method_state(self) -> dict[str, Any]:
        return {"kept": None if self._kept is None else [pack_mask(mask) for mask in self._kept]}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        kept = state.get("kept")
        if kept is None:
            self._kept = None
            return
        if not isinstance(kept, list) or len(kept) != len(self._layers) or not all(isinstance(m, str) for m in kept):
            raise ValueError("the sparsity state is malformed: kept must be a list of base64 texts, one a layer")
        self._kept = [
            unpack_mask(text, torch.empty(layer.grid, device=layer.linear.weight.device))
            for text, layer in zip(kept, self._layers, strict=True)
        ]


class ElasticGroupLasso(GroupLasso):
    """Elastic group LASSO: `GroupLasso` with a squared l2 norm of the blocks in the penalty.

    Each proximal step also divides a block by `1 + l2 * omega_g / T`, so that a block of average step size without
    gradient ends up smaller by `exp(-l2)`.

    Args:
        layers: `{name: BlockLayer}`.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        total_steps: Optimizer steps of the whole training.
        strength: Weight of the group norm, as in `GroupLasso`.
        l2: Weight of the squared norm.
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        start: Start of the penalty as a share of `total_steps`.
        end: Its end, where the masks freeze.
        interval: Optimizer steps between two choices of the blocks that must not vanish.

    Raises:
        TypeError: A layer is no `nn.Linear`.
        ValueError: An option is out of range, or layers, steps or target do not fit.
    """

    _CHECKS: ClassVar[Checks] = {"strength": checked_number, "l2": checked_number}

    def __init__(
        self,
        layers: Layers,
        *,
        target_sparsity: float,
        total_steps: int,
        strength: float = 4.0,
        l2: float = 0.5,
        scope: str = "global",
        start: float = 0.05,
        end: float = 0.5,
        interval: int = 10,
    ) -> None:
        super().__init__(
            layers,
            target_sparsity=target_sparsity,
            total_steps=total_steps,
            strength=strength,
            scope=scope,
            start=start,
            end=end,
            interval=interval,
        )
        self.l2 = self._l2 = checked_number("l2", l2)


def _relative_step_sizes(optimizer: Optimizer, layers: list[BlockLayer]) -> list[Tensor]:
    """Each block's step size over that of its layer, harmonic means, `[O, I]`: the learning rate cancels.

    From the second moment of Adam and its kin, `1 / step size = (sqrt(v) + eps) / lr`; ones where there is none.
    """
    moments = [_second_moment(optimizer, layer.linear.weight) for layer in layers]
    present = iter(gather([moment for moment in moments if moment is not None]))
    relative: list[Tensor] = []
    for layer, moment in zip(layers, moments, strict=True):
        if moment is None:
            relative.append(torch.ones(layer.grid, dtype=torch.float64, device=layer.linear.weight.device))
            continue
        root = to_blocks(next(present).double().sqrt(), layer.block_size).mean(1).view(layer.grid) + 1e-30
        relative.append(root.mean() / root)
    return relative


def _second_moment(optimizer: Optimizer, weight: Tensor) -> Tensor | None:
    state = optimizer.state.get(weight, {})
    moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    return moment if isinstance(moment, Tensor) and moment.shape == weight.shape else None
