"""What all baselines share: the schedule, the hooks on the optimizer, masks that hold, and the state of a training."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kron_hf.baselines.block_layer import (
    BlockLayer,
    Layers,
    block_rms,
    checked_layers,
    entry_mask,
    gather_weights,
    share_of_zero_blocks,
)
from kron_hf.baselines.options import Checks, schedule
from kron_hf.sharding import local, shard_of
from kron_hf.sparsity.masks import pack_mask, unpack_mask
from kron_hf.sparsity.optimizer_state import clear_state, overflowed, raw_optimizer
from kron_hf.sparsity.options import SparsityOptions
from kron_hf.sparsity.pruning import check_reachable, choose_blocks

__all__ = ["BlockPruner"]


class BlockPruner:
    """Base of the baselines: prunes blocks of dense linears during training, then freezes which ones are zero.

    Use it as a `Sparsifier`: `attach` it to the optimizer, or call `step` after each optimizer step. From `end` on the
    target is met exactly: at least `target_sparsity` of the entries of all layers lie in zero blocks, by less than one
    block more, no layer is emptied, and the rest of the training fine-tunes what is left.

    Zeros that are held stay exact under any optimizer: the gradient of dead blocks is zeroed before each step (their
    share of the norm that gradient clipping sees is not), weights and the optimizer's state after it. Nothing holds
    them after the training: a dense model is an ordinary one, see `to_kron`.

    Masks are functions of weights, gradients and step alone, so they are the same on all processes: data parallel
    training sends nothing for them, FSDP2 an all-gather of the weights where blocks are ranked. Make it after DDP or
    FSDP2 have wrapped the model.

    Args:
        layers: `{name: BlockLayer}`, from `block_layers(model, config)` or made by hand.
        options: Target and schedule.
        total_steps: Optimizer steps of the whole training.

    Raises:
        TypeError: A layer is no `nn.Linear`.
        ValueError: The layers do not fit, the training is shorter than the schedule, or the target is impossible
            without emptying a layer.
    """

    _CHECKS: ClassVar[Checks] = {}  # of the options that not all algorithms have

    def __init__(
        self,
        layers: Layers,
        options: SparsityOptions,
        total_steps: int,
    ) -> None:
        assert options.target_sparsity is not None
        self.options = options
        self.target_sparsity = options.target_sparsity
        self.total_steps = total_steps
        self.start_step, self.end_step = options.ramp(total_steps)
        self._named = checked_layers(layers)
        self._layers = list(self._named.values())
        self._check_possible()
        self._dead: list[Tensor] | None = None  # the blocks that are held at zero, [O, I] each
        self._step_count = 0
        self._frozen = False
        self._frozen_sparsity: float | None = None
        self._stepped_by_hand = False
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Checks the options of an algorithm before there are layers and steps.

        Raises:
            TypeError: There is no such option, or one is missing.
            ValueError: An option is out of range.
        """
        bound = inspect.signature(cls).bind({}, total_steps=1, **options)
        bound.apply_defaults()
        given = bound.arguments
        scope, interval = given.get("scope", "global"), given.get("interval", 1)
        schedule(given["target_sparsity"], given["start"], given["end"], interval, scope)
        for name, check in cls._CHECKS.items():
            check(name, given[name])

    @property
    def layers(self) -> dict[str, BlockLayer]:
        """The layers it prunes, by name."""
        return dict(self._named)

    @property
    def sparsity(self) -> float:
        """Share of the entries of all layers that lie in blocks which are exactly zero now."""
        return share_of_zero_blocks(self._layers)

    @property
    def frozen(self) -> bool:
        """Whether the schedule has ended and the masks are frozen."""
        return self._frozen

    @property
    def frozen_sparsity(self) -> float | None:
        """The sparsity of the masks when they froze; None before."""
        return self._frozen_sparsity

    @property
    def step_count(self) -> int:
        """Optimizer steps counted so far; steps skipped for an fp16 overflow are not among them."""
        return self._step_count

    @property
    def dead_blocks(self) -> dict[str, Tensor] | None:
        """The blocks that are held at zero, bool `[O, I]` by name of layer; None while none are."""
        return None if self._dead is None else dict(zip(self._named, self._dead, strict=True))

    def attach(self, optimizer: Optimizer) -> None:
        """Runs around every real step of `optimizer` from now on (Accelerate's wrapper is looked through).

        Raises:
            RuntimeError: It is attached already, or `step` was called by hand.
            TypeError: Not a torch optimizer.
        """
        if self._hooks or self._stepped_by_hand:
            name = type(self).__name__
            raise RuntimeError(f"{name}: either attach one optimizer or call step() after each step, never both")
        raw = raw_optimizer(optimizer)
        self._hooks = [
            raw.register_step_pre_hook(self._before_step),
            raw.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Removes the hooks from the optimizer, if there are any."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def step(self, optimizer: Optimizer) -> None:
        """The explicit form of `attach`: call it after each optimizer step that was not skipped, before `zero_grad`.

        Raises:
            RuntimeError: An optimizer is attached.
            TypeError: Not a torch optimizer.
        """
        if self._hooks:
            raise RuntimeError(f"{type(self).__name__}: an optimizer is attached, so step() must not be called by hand")
        raw = raw_optimizer(optimizer)
        self._stepped_by_hand = True
        self._read_gradients()
        self._hold(raw)  # dead blocks have moved with gradients that a hook would have zeroed
        self._advance(raw)

    def close(self) -> None:
        """Ends the training: detaches, and warns if it ended before the masks were frozen."""
        self.detach()
        if not self._frozen:
            warnings.warn(
                f"training ended after {self._step_count} optimizer steps, before the end of the schedule of "
                f"{type(self).__name__} at step {self.end_step}: target_sparsity={self.target_sparsity} was not "
                f"reached and no mask was frozen (sparsity is {self.sparsity:.4f})",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the weights; plain JSON types."""
        masks = None if self._dead is None else [pack_mask(mask) for mask in self._dead]
        return {
            "algorithm": type(self).__name__,
            "step_count": self._step_count,
            "frozen": self._frozen,
            "layers": {name: [*layer.grid, *layer.block_size] for name, layer in self._named.items()},
            "dead": masks,
            "method": self._method_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; the weights are loaded apart from it, before or after.

        Raises:
            ValueError: The state is of another algorithm or of a model with other layers, or malformed.
        """
        self._check_state(state)
        dead = None if state["dead"] is None else self._unpacked(state["dead"])
        self._load_method_state(state.get("method", {}))
        self._step_count, self._frozen, self._dead = state["step_count"], state["frozen"], dead
        self._frozen_sparsity = self._held_share() if self._frozen else None

    def _update(self, step: int, optimizer: Optimizer) -> None:
        """After optimizer step number `step`, strictly between start and end of the schedule."""
        raise NotImplementedError

    def _finish(self, step: int, optimizer: Optimizer) -> list[Tensor]:
        """The masks `[O, I]` to freeze, at the end of the schedule."""
        return self._choose(self.target_sparsity)

    def _read_gradients(self) -> None:
        """Before an optimizer step, while the gradients are those of all blocks."""

    def _method_state(self) -> dict[str, Any]:
        """What the method itself must remember, in plain JSON types; most are functions of the weights and the step."""
        return {}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        """Continues from `_method_state`."""

    def _choose(self, sparsity: float) -> list[Tensor]:
        """The blocks of smallest norm, those that are held first, that make up `sparsity`."""
        pairs = zip(self._layers, gather_weights(self._layers), strict=True)
        scores = [block_rms(weight, layer) for layer, weight in pairs]
        if self._dead is not None:
            held = zip(scores, self._dead, strict=True)
            scores = [score.masked_fill(dead.to(score.device), -torch.inf) for score, dead in held]
        return choose_blocks(scores, self._entries(), sparsity, self.options.scope)

    def _unpacked(self, texts: list[str]) -> list[Tensor]:
        return [
            unpack_mask(text, torch.empty(layer.grid, device=layer.linear.weight.device))
            for text, layer in zip(texts, self._layers, strict=True)
        ]

    def _entries(self) -> list[int]:
        return [layer.block_entries for layer in self._layers]

    def _held_share(self) -> float:
        held = zip(self._layers, self._dead or [], strict=True)
        zero = sum(int(mask.sum()) * layer.block_entries for layer, mask in held)
        return zero / sum(layer.linear.weight.numel() for layer in self._layers)

    def _zero(self, masks: list[Tensor]) -> None:
        for layer, mask in zip(self._layers, masks, strict=True):
            weight = layer.linear.weight
            local(weight).masked_fill_(shard_of(entry_mask(mask, layer), weight), 0.0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if overflowed(optimizer):
            return
        self._read_gradients()
        for layer, mask in zip(self._layers, self._dead or [], strict=False):
            gradient = layer.linear.weight.grad
            if gradient is not None:
                local(gradient).masked_fill_(shard_of(entry_mask(mask, layer), gradient), 0.0)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not overflowed(optimizer):
            self._advance(optimizer)

    @torch.no_grad()
    def _advance(self, optimizer: Optimizer) -> None:
        self._step_count += 1
        if not self._frozen:
            if self._step_count >= self.end_step:
                self._dead, self._frozen = self._finish(self._step_count, optimizer), True
                self._frozen_sparsity = self._held_share()
            elif self._step_count > self.start_step:
                self._update(self._step_count, optimizer)
        self._hold(optimizer)

    @torch.no_grad()
    def _hold(self, optimizer: Optimizer) -> None:
        if self._dead is not None:
            self._zero(self._dead)
            for layer, mask in zip(self._layers, self._dead, strict=True):
                clear_state(optimizer, cast(nn.Parameter, layer.linear.weight), entry_mask(mask, layer))

    def _check_possible(self) -> None:
        total = sum(layer.linear.weight.numel() for layer in self._layers)
        check_reachable(self.target_sparsity, total, sum(self._entries()), len(self._layers))

    def _check_state(self, state: object) -> None:
        """Says what is wrong with a state that was read from a damaged file."""
        content = state if isinstance(state, Mapping) else {}
        dead, step, frozen = (content.get(key, 0) for key in ("dead", "step_count", "frozen"))
        if type(step) is not int or step < 0 or type(frozen) is not bool:
            raise ValueError("the sparsity state is malformed: step_count must be a count and frozen a bool")
        algorithm, layers = content.get("algorithm"), content.get("layers")
        if algorithm != type(self).__name__:
            raise ValueError(f"the sparsity state is of {algorithm!r}, not of {type(self).__name__}")
        own = self.state_dict()["layers"]
        if layers != own:
            given = layers if isinstance(layers, Mapping) else {}
            changed = sorted(name for name in {*given, *own} if given.get(name) != own.get(name))
            raise ValueError(
                f"the sparsity state is of other layers than this model's, or of other blocks; they differ in "
                f"{changed[:5]!r}"
            )
        is_texts = isinstance(dead, list) and len(dead) == len(own) and all(isinstance(text, str) for text in dead)
        if not (is_texts or (dead is None and not frozen)):
            raise ValueError("the sparsity state is malformed: dead must be a list of base64 texts, one a layer")
        if not isinstance(content.get("method", {}), dict):
            raise ValueError("the sparsity state is malformed: method must be an object")
