"""Block magnitude pruning: in rounds, or along a cubic ramp."""

from typing import ClassVar

from torch.optim import Optimizer

from kron_hf.baselines.block_layer import Layers
from kron_hf.baselines.options import Checks, checked_count, schedule
from kron_hf.baselines.pruner import BlockPruner
from kron_hf.sparsity.pruning import cubic_sparsity

__all__ = ["GradualPruning", "IterativePruning"]


class GradualPruning(BlockPruner):
    """Gradual block magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878), the strongest baseline we know of.

    Every `interval` steps of a cubic ramp from `start` to `end` the blocks of smallest norm become zero; between two
    such steps blocks may grow back. At `end` the target is met exactly and the masks freeze. The schedule is that of
    `Sparsifier(target_sparsity=...)`. See `BlockPruner` for what all baselines share.

    Args:
        layers: `{name: BlockLayer}`.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        total_steps: Optimizer steps of the whole training.
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        start: Start of the ramp as a share of `total_steps`.
        end: Its end, where the masks freeze.
        interval: Optimizer steps between two prunings.

    Raises:
        TypeError: A layer is no `nn.Linear`.
        ValueError: An option is out of range, or layers, steps or target do not fit.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(16, 16)
        >>> optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        >>> pruner = GradualPruning({"linear": (linear, 4)}, target_sparsity=0.5, total_steps=40)
        >>> pruner.attach(optimizer)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     linear(torch.ones(1, 16)).square().sum().backward()
        ...     optimizer.step()
        >>> pruner.close()
        >>> pruner.sparsity
        0.5
    """

    def __init__(
        self,
        layers: Layers,
        *,
        target_sparsity: float,
        total_steps: int,
        scope: str = "global",
        start: float = 0.05,
        end: float = 0.5,
        interval: int = 10,
    ) -> None:
        super().__init__(layers, schedule(target_sparsity, start, end, interval, scope), total_steps)

    def _update(self, step: int, optimizer: Optimizer) -> None:
        if step % self.options.interval == 0:
            steps = {"start_step": self.start_step, "end_step": self.end_step}
            self._zero(self._choose(cubic_sparsity(step, **steps, final=self.target_sparsity)))


class IterativePruning(BlockPruner):
    """Iterative block magnitude pruning: `rounds` prunings, each followed by training on what is left.

    The rounds are spread evenly: number k of n is at `start + k / n * (end - start)`, the last one at `end`. Each
    prunes the same share of the blocks that remain, so `(1 - target_sparsity) ** (k / n)` of the entries are left
    after it; pruned blocks stay zero, the weights go on from where they are. See `BlockPruner` for what all baselines
    share.

    Args:
        layers: `{name: BlockLayer}`.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        total_steps: Optimizer steps of the whole training.
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        start: Start of the first round's training as a share of `total_steps`.
        end: Where the last round prunes and the masks freeze.
        rounds: Number of prunings, n; 1 is one-shot pruning.

    Raises:
        TypeError: A layer is no `nn.Linear`.
        ValueError: An option is out of range, or layers, steps or target do not fit.
    """

    _CHECKS: ClassVar[Checks] = {"rounds": checked_count}

    def __init__(
        self,
        layers: Layers,
        *,
        target_sparsity: float,
        total_steps: int,
        scope: str = "global",
        start: float = 0.05,
        end: float = 0.5,
        rounds: int = 5,
    ) -> None:
        self.rounds = checked_count("rounds", rounds)
        super().__init__(layers, schedule(target_sparsity, start, end, 1, scope), total_steps)
        steps = self.end_step - self.start_step
        if steps < rounds:
            raise ValueError(
                f"training is too short for rounds={rounds}: with total_steps={total_steps} they lie between step "
                f"{self.start_step} (start={start}) and step {self.end_step} (end={end})"
            )
        self._round_at = {self.start_step + round(k / rounds * steps): k for k in range(1, rounds + 1)}

    def _update(self, step: int, optimizer: Optimizer) -> None:
        if step in self._round_at:
            left = (1 - self.target_sparsity) ** (self._round_at[step] / self.rounds)
            self._dead = self._choose(1 - left)
