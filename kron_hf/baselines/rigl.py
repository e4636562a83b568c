"""Block-wise RigL: a fixed number of living blocks that move to where the gradient is large."""

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kron_hf.baselines.block_layer import Layers, block_rms, gather_weights
from kron_hf.baselines.options import Checks, checked_choice, checked_number, schedule
from kron_hf.baselines.pruner import BlockPruner
from kron_hf.sharding import gather
from kron_hf.sparsity.pruning import layer_quotas, required_entries

__all__ = ["DISTRIBUTIONS", "BlockRigL", "cosine_share", "erk_quotas"]

DISTRIBUTIONS = ("erk", "uniform")


class BlockRigL(BlockPruner):
    """RigL on blocks (Evci et al. 2020, "Rigging the Lottery", arXiv 1911.11134).

    The target holds from the first step. Every `interval` steps until `end` each layer drops the share
    `drop_fraction / 2 * (1 + cos(pi * step / end_step))` of its living blocks, those of smallest norm, and as many of
    the blocks that are dead then, those of largest gradient norm, come to life: the gradient is that of the whole
    weight, read before the optimizer's step. A block that is grown starts at zero, without optimizer state; a dropped
    one that is grown at once goes on as it was, as in the authors' code. Blocks without gradient are not grown.
    At `end` the masks freeze.

    The first masks keep the blocks of largest norm of each layer: as good as random where the weights are random, and
    no loss where they are trained. They are applied at once, when this is made. Just after an update `sparsity` also
    counts the blocks that have just been grown. See `BlockPruner` for what all baselines share.

    Args:
        layers: `{name: BlockLayer}`.
        target_sparsity: Share of entries in zero blocks, in [0, 1).
        total_steps: Optimizer steps of the whole training.
        distribution: How layers share the target. "erk" (Erdos-Renyi): a layer of O x I blocks keeps a number in
            proportion to `O + I`, at most all. "uniform": the same share of each layer.
        drop_fraction: Share of the living blocks that moves in the first update, alpha in the paper, in [0, 1].
        start: Share of `total_steps` before the first update.
        end: Share of `total_steps` after which the masks are frozen.
        interval: Optimizer steps between two updates, Delta T in the paper.

    Raises:
        TypeError: A layer is no `nn.Linear`.
        ValueError: An option is out of range, or layers, steps or target do not fit.
    """

    _CHECKS: ClassVar[Checks] = {
        "distribution": partial(checked_choice, choices=DISTRIBUTIONS),
        "drop_fraction": partial(checked_number, most=1.0),
    }

    def __init__(
        self,
        layers: Layers,
        *,
        target_sparsity: float,
        total_steps: int,
        distribution: str = "erk",
        drop_fraction: float = 0.3,
        start: float = 0.0,
        end: float = 0.75,
        interval: int = 50,
    ) -> None:
        self.distribution = checked_choice("distribution", distribution, DISTRIBUTIONS)
        self.drop_fraction = checked_number("drop_fraction", drop_fraction, 1.0)
        super().__init__(layers, schedule(target_sparsity, start, end, interval), total_steps)
        self._gradient_norms: list[Tensor] | None = None
        self._dead = self._first_masks()
        self._zero(self._dead)

    @torch.no_grad()
    def _first_masks(self) -> list[Tensor]:
        grids, entries = [layer.grid for layer in self._layers], self._entries()
        required = required_entries(self.target_sparsity, sum(layer.linear.weight.numel() for layer in self._layers))
        if self.distribution == "erk":
            quotas = erk_quotas(grids, entries, required)
        else:
            quotas = layer_quotas([math.prod(grid) for grid in grids], entries, [0] * len(grids), required)
        pairs = zip(self._layers, gather_weights(self._layers), strict=True)
        norms = [block_rms(weight, layer) for layer, weight in pairs]
        return [_lowest(norm, quota) for norm, quota in zip(norms, quotas, strict=True)]

    def _updates_at(self, step: int) -> bool:
        return self.start_step < step < self.end_step and step % self.options.interval == 0

    @torch.no_grad()
    def _read_gradients(self) -> None:
        if not self._updates_at(self._step_count + 1):
            return
        gradients = [layer.linear.weight.grad for layer in self._layers]
        present = iter(gather([gradient for gradient in gradients if gradient is not None]))
        self._gradient_norms = [
            torch.zeros(layer.grid, dtype=torch.float64, device=layer.linear.weight.device)
            if gradient is None
            else block_rms(next(present), layer)
            for layer, gradient in zip(self._layers, gradients, strict=True)
        ]

    def _update(self, step: int, optimizer: Optimizer) -> None:
        if not self._updates_at(step):
            return
        assert self._dead is not None
        assert self._gradient_norms is not None
        share = cosine_share(step, self.end_step, self.drop_fraction)
        weights = gather_weights(self._layers)
        self._dead = [
            moved(dead, block_rms(weight, layer), gradient, share)
            for layer, weight, dead, gradient in zip(
                self._layers, weights, self._dead, self._gradient_norms, strict=True
            )
        ]
        self._gradient_norms = None

    def _finish(self, step: int, optimizer: Optimizer) -> list[Tensor]:
        assert self._dead is not None
        return self._dead


def cosine_share(step: int, end_step: int, drop_fraction: float) -> float:
    """Share of the living blocks that moves at a step: `alpha / 2 * (1 + cos(pi * step / end_step))` (Evci et al.)."""
    return drop_fraction / 2 * (1 + math.cos(math.pi * step / end_step))


def moved(dead: Tensor, norm: Tensor, gradient_norm: Tensor, share: float) -> Tensor:
    """The masks after one update: the smallest living blocks die, as many dead ones of largest gradient come to life.

    Args:
        dead: bool `[O, I]`.
        norm: Of the weight's blocks.
        gradient_norm: Of the gradient's blocks.
        share: Of the living blocks, rounded down.

    Returns:
        bool `[O, I]` with as many dead blocks as before.
    """
    dropped = _lowest(norm.masked_fill(dead, torch.inf), int(share * int((~dead).sum())))
    candidates = (dead | dropped).flatten()
    # Without gradient a dead block would stay zero; a dropped one goes on as it was.
    gain = gradient_norm.flatten().masked_fill((gradient_norm == 0).flatten() & dead.flatten(), -1.0)
    gain = gain.masked_fill(~candidates, -torch.inf)
    grown = gain.argsort(stable=True, descending=True)[: int(dropped.sum())]
    after = candidates.clone()
    after[grown] = False
    return after.view(dead.shape)


def erk_quotas(grids: list[tuple[int, int]], entries: list[int], required: int) -> list[int]:
    """How many blocks of each layer shall be dead so that the living ones are in proportion to `O + I`.

    Args:
        grids: Blocks of each layer, `(O, I)`.
        entries: Entries of one block of each layer, `bo * bi`.
        required: Entries that shall be dead over all layers.

    Returns:
        Counts from 0 to `O * I - 1` whose entries reach `required` by less than one block. Rounding goes to the
        layers with the lowest share of dead blocks, earlier ones first.
    """
    sizes = [math.prod(grid) for grid in grids]

    def at(factor: float) -> list[int]:
        alive = [min(max(math.ceil(factor * sum(grid)), 1), size) for grid, size in zip(grids, sizes, strict=True)]
        return [size - count for size, count in zip(sizes, alive, strict=True)]

    def missing(counts: list[int]) -> int:
        return required - sum(count * each for count, each in zip(counts, entries, strict=True))

    low, high = 0.0, float(max(sizes))
    for _ in range(60):  # beyond the resolution of a float
        middle = (low + high) / 2
        low, high = (low, middle) if missing(at(middle)) >= 0 else (middle, high)
    counts = at(high)
    while missing(counts) > 0:
        open_layers = [i for i, count in enumerate(counts) if count < sizes[i] - 1]
        counts[min(open_layers, key=lambda i: counts[i] / sizes[i])] += 1
    return counts


def _lowest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view(scores.shape)
