"""Pruning along a cubic ramp to a target sparsity."""

import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kron_hf.layers import KronLinear
from kron_hf.sharding import local, shard_of
from kron_hf.sparsity.options import SparsityOptions
from kron_hf.sparsity.pruning import block_entries, choose_dead, cubic_sparsity, required_entries, share_of_entries

__all__ = ["TargetRamp"]


class TargetRamp:
    """The cubic ramp of a training; `Sparsifier` calls it.

    Args:
        options: With a `target_sparsity`.
        start_step: Optimizer steps before the ramp.
        end_step: The step with which it ends.
        layers: The layers to prune.
        always: Masks of the blocks that were dead before, None for none.

    Raises:
        ValueError: The target is impossible without emptying a layer.
    """

    def __init__(
        self,
        options: SparsityOptions,
        start_step: int,
        end_step: int,
        layers: list[KronLinear],
        always: list[Tensor | None],
    ) -> None:
        assert options.target_sparsity is not None
        self._target, self._scope, self._interval = options.target_sparsity, options.scope, options.interval
        self._steps = {"start_step": start_step, "end_step": end_step}
        self._warned = False
        self._check_possible(layers, always)

    def advance(
        self, layers: list[KronLinear], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> None:
        """After optimizer step number `step`: every `interval` steps the least important blocks become zero."""
        if step % self._interval == 0:
            initial = min(share_of_entries(layers, always), self._target)
            self._prune(layers, always, cubic_sparsity(step, **self._steps, final=self._target, initial=initial))

    def finish(
        self, layers: list[KronLinear], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> list[Tensor]:
        """Meets the target.

        Returns:
            The zeros of S, masks `[O, I]`, the same on all processes.
        """
        return self._prune(layers, always, self._target)

    def state_dict(self) -> dict[str, Any]:
        """The ramp is a function of the step alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to load."""

    def _prune(self, layers: list[KronLinear], always: list[Tensor | None], sparsity: float) -> list[Tensor]:
        initial = share_of_entries(layers, always)
        if initial > 0 and initial >= self._target and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model's frozen masks already have sparsity {initial:.4f}, which is not below "
                f"target_sparsity={self._target}: nothing is pruned and nothing revived",
                stacklevel=2,
            )
        masks = choose_dead(layers, always, sparsity, self._scope)
        for layer, mask in zip(layers, masks, strict=True):
            local(layer.s).masked_fill_(shard_of(mask, layer.s), 0.0)
        return masks

    def _check_possible(self, layers: list[KronLinear], always: list[Tensor | None]) -> None:
        total = sum(layer.s.numel() * block_entries(layer) for layer in layers)
        masks = zip(layers, always, strict=True)
        kept = sum(block_entries(layer) for layer, mask in masks if mask is None or not bool(mask.all()))
        required = required_entries(self._target, total)
        if required > total - kept:
            raise ValueError(
                f"target_sparsity={self._target} needs {required} of {total} entries in zero blocks, "
                f"but with one block kept in each of the {len(layers)} Kronecker layers at most {total - kept} can be "
                f"(sparsity {(total - kept) / total:.4f})"
            )
