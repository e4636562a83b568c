"""Pruning along a cubic ramp to a target sparsity."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kron_hf.kron_layer import KronLayer
from kron_hf.sharding import local, shard_of
from kron_hf.sparsity.groups import regrouping
from kron_hf.sparsity.masks import pack_mask, unpack_mask
from kron_hf.sparsity.options import SparsityOptions
from kron_hf.sparsity.pruning import block_entries, check_reachable, choose_dead, cubic_sparsity, share_of_entries
from kron_hf.sparsity.shadow import Shadow

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
        layers: list[KronLayer],
        always: list[Tensor | None],
    ) -> None:
        assert options.target_sparsity is not None
        self._target, self._scope, self._interval = options.target_sparsity, options.scope, options.interval
        self._regroup = regrouping(options.group_penalty, options.groups)
        self._shadow = Shadow() if options.regrowth == "straight_through" else None
        self._steps = {"start_step": start_step, "end_step": end_step}
        self._warned = False
        self._check_possible(layers, always)

    def advance(
        self, layers: list[KronLayer], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> None:
        """After optimizer step number `step`: every `interval` steps the least important blocks become zero.

        Between two such steps they may move, in the model or in the shadow alone.
        """
        if self._shadow is not None:
            self._shadow.collect(layers, _required(optimizer))
        if step % self._interval == 0:
            initial = min(share_of_entries(layers, always), self._target)
            wanted = cubic_sparsity(step, **self._steps, final=self._target, initial=initial)
            masks = self._choose(layers, always, wanted, optimizer)
            if self._shadow is None:
                _zero(layers, masks)
            else:
                self._shadow.hide(layers, masks, _required(optimizer))

    def finish(
        self, layers: list[KronLayer], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> list[Tensor]:
        """Meets the target.

        Returns:
            The zeros of S, masks `[O, I]`, the same on all processes.
        """
        if self._shadow is not None:
            self._shadow.collect(layers, _required(optimizer))  # finds what was loaded, should that be the last step
        masks = self._choose(layers, always, self._target, optimizer)
        _zero(layers, masks)
        return masks

    def state_dict(self) -> dict[str, Any]:
        """What hides S of straight-through regrowth; the ramp itself is a function of the step alone."""
        return {} if self._shadow is None else {"hidden": [pack_mask(mask) for mask in self._shadow.masks]}

    def load_state_dict(self, state: Mapping[str, Any], layers: list[KronLayer]) -> None:
        """Continues from `state_dict`; `{}` begins afresh.

        Raises:
            ValueError: The state is malformed.
        """
        hidden = state.get("hidden", [])
        if not isinstance(hidden, list) or not all(isinstance(text, str) for text in hidden):
            raise ValueError("the sparsity state is malformed: hidden must be a list of base64 texts")
        if len(hidden) not in (0, len(layers)):
            raise ValueError(f"the sparsity state has {len(hidden)} hidden masks for {len(layers)} Kronecker layers")
        masks = [unpack_mask(text, layer.s, "hidden") for text, layer in zip(hidden, layers, strict=False)]
        if self._shadow is not None:
            self._shadow = Shadow(masks)

    def _choose(
        self, layers: list[KronLayer], always: list[Tensor | None], sparsity: float, optimizer: Optimizer | None
    ) -> list[Tensor]:
        initial = share_of_entries(layers, always)
        if initial > 0 and initial >= self._target and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model's frozen masks already have sparsity {initial:.4f}, which is not below "
                f"target_sparsity={self._target}: nothing is pruned and nothing revived",
                stacklevel=2,
            )
        if self._shadow is not None:
            self._shadow.reveal(layers, _required(optimizer))
        return choose_dead(layers, always, sparsity, self._scope, self._regroup)

    def _check_possible(self, layers: list[KronLayer], always: list[Tensor | None]) -> None:
        total = sum(layer.s.numel() * block_entries(layer) for layer in layers)
        masks = zip(layers, always, strict=True)
        kept = sum(block_entries(layer) for layer, mask in masks if mask is None or not bool(mask.all()))
        check_reachable(self._target, total, kept, len(layers))


def _zero(layers: list[KronLayer], masks: list[Tensor]) -> None:
    for layer, mask in zip(layers, masks, strict=True):
        local(layer.s).masked_fill_(shard_of(mask, layer.s), 0.0)


def _required(optimizer: Optimizer | None) -> Optimizer:
    if optimizer is None:
        raise TypeError("straight_through keeps values in the optimizer's state: call Sparsifier.step(optimizer)")
    return optimizer
