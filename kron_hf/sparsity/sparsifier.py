"""Training to block sparsity: to an exact target, or with the paper's l1 penalty; then a frozen mask."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates
from kron_hf.sparsity.masks import pack_mask, unpack_mask
from kron_hf.sparsity.optimizer_state import clear_state, overflowed, raw_optimizer
from kron_hf.sparsity.options import SparsityOptions
from kron_hf.sparsity.proximal import ProximalL1
from kron_hf.sparsity.pruning import kron_layers, model_sparsity, share_of_entries
from kron_hf.sparsity.target_ramp import TargetRamp

__all__ = ["Sparsifier"]


class _Method(Protocol):
    """What makes S sparse between the start and the end of the schedule."""

    def advance(
        self, layers: list[KronLayer], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> None: ...

    def finish(
        self, layers: list[KronLayer], always: list[Tensor | None], step: int, optimizer: Optimizer | None
    ) -> list[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], layers: list[KronLayer]) -> None: ...


class Sparsifier:
    """Makes the Kronecker layers of a model block-sparse during training, then freezes their masks.

    With `target_sparsity`, every `interval` optimizer steps of a cubic ramp the S of the least important blocks is set
    to exactly zero; between two such steps blocks may grow back: from zero and seen by the forward
    (`regrowth="interval"`), or hidden from it, from the values they would have without the masks (`"straight_through"`,
    see `kron_hf.sparsity.shadow`). At the ramp's end the target is met exactly: at least
    `target_sparsity` of the entries of all Kronecker weights lie in zero blocks, by less than one block more.

    With `l1`, the paper's mode, each step from `start` to `end` is followed by a proximal step of the penalty
    `l1 / n * sum_layers ||S||_1`, where n is the number of entries of S over all layers: `l1` weighs the mean of |s|,
    and the paper's lambda is `l1 / n`. At `end`, blocks that the penalty alone would zero within `interval` steps
    become zero as well. More `l1` gives more sparsity, but how much depends on model, data and learning rate; prefer
    a target if you want a number. See `kron_hf.sparsity.proximal` for the mathematics. Adam, AdamW and SGD; momentum of
    SGD amplifies the gradient by 1 / (1 - momentum) against the penalty.

    A `group_penalty` makes both prefer whole rows and columns of blocks, which can be cut out of a layer afterwards;
    `kron_hf.sparsity.groups` has the formulas, `empty_rows` and `empty_columns` what came of it.

    Either way no layer is emptied, and at `end` their `freeze_mask` makes the zeros permanent; the rest of the
    training fine-tunes what is left.

    Blocks frozen before the training (of a pruned model that was loaded) count towards the target and stay dead. What
    is pruned is a function of the weights and the step alone (and of the optimizer's state under l1); ties go by layer
    order and index. So it is the same on all processes: data parallel training sends nothing for it, FSDP2 one
    all-gather of the factors every `interval` steps, and in each step one small all-reduce if l1 penalises columns.

    Args:
        model: A model with Kronecker layers, at any depth, also wrapped by DDP, FSDP2 or `torch.compile`.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        l1: Weight of the l1 penalty on S. Give exactly one of `target_sparsity` and `l1`.
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        total_steps: Optimizer steps of the whole training.
        start: Start of the ramp, or of the penalty, as a share of `total_steps`.
        end: Its end, where the masks freeze, as a share of `total_steps`.
        interval: Optimizer steps between two prunings, or two rescalings of S against A under l1.
        regrowth: "interval" or "straight_through"; the latter needs a target, and `step` the optimizer.
        group_penalty: How much whole rows or columns of S count against single blocks, in [0, 1].
        groups: "rows" (output features), "columns" (input features) or "both".

    Raises:
        ValueError: An option is out of range, the model has no Kronecker layer or its parameters are flattened (FSDP
            version 1, DeepSpeed ZeRO-3), the training is shorter than the schedule, or the target is impossible
            without emptying a layer.

    Example:
        >>> import torch
        >>> model = KronLinear(16, 16, block_size=4, rank=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = Sparsifier(model, target_sparsity=0.5, total_steps=40)
        >>> sparsifier.attach(optimizer)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 16)).square().sum().backward()
        ...     optimizer.step()
        >>> sparsifier.close()
        >>> model.sparsity
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_sparsity: float | None = None,
        l1: float | None = None,
        scope: str = "global",
        total_steps: int,
        start: float = 0.05,
        end: float = 0.5,
        interval: int = 10,
        regrowth: str = "interval",
        group_penalty: float = 0.0,
        groups: str = "both",
    ) -> None:
        self.options = SparsityOptions(
            target_sparsity=target_sparsity,
            l1=l1,
            scope=scope,
            start=start,
            end=end,
            interval=interval,
            regrowth=regrowth,
            group_penalty=group_penalty,
            groups=groups,
        )
        self._model = model
        layers = kron_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no Kronecker layers to make sparse; convert it first")
        if any(isinstance(module, KronCandidates) for module in model.modules()):
            raise ValueError(
                "blocks are made sparse once their size is chosen: select it with BlockSizeCallback, then train "
                "get_kron_model(model, callback.config), a model of the chosen size, to a sparsity"
            )
        _check_whole(layers)
        self.total_steps = total_steps
        self.start_step, self.end_step = self.options.ramp(total_steps)
        self._initial_dead = [None if layer.dead_blocks is None else layer.dead_blocks.clone() for layer in layers]
        self._method: _Method = (
            TargetRamp(self.options, self.start_step, self.end_step, layers, self._initial_dead)
            if l1 is None
            else ProximalL1(self.options)
        )
        self._step_count = 0
        self._frozen = False
        self._frozen_sparsity: float | None = None
        self._stepped_by_hand = False
        self._hook: RemovableHandle | None = None

    @property
    def sparsity(self) -> float:
        """Share of the entries of all Kronecker weights that lie in zero blocks now."""
        return model_sparsity(self._model)

    @property
    def frozen(self) -> bool:
        """Whether the ramp has ended and the masks are frozen."""
        return self._frozen

    @property
    def frozen_sparsity(self) -> float | None:
        """The sparsity of the masks when they froze; None before."""
        return self._frozen_sparsity

    @property
    def step_count(self) -> int:
        """Optimizer steps counted so far; steps skipped for an fp16 overflow are not among them."""
        return self._step_count

    def attach(self, optimizer: Optimizer) -> None:
        """Runs after every real step of `optimizer` from now on (Accelerate's wrapper is looked through).

        Raises:
            RuntimeError: It is attached already, or `step` was called by hand.
            TypeError: Not a torch optimizer.
        """
        if self._hook is not None or self._stepped_by_hand:
            raise RuntimeError("Sparsifier: either attach one optimizer or call step() after each step, never both")
        self._hook = raw_optimizer(optimizer).register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Removes the hook from the optimizer, if there is one."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def step(self, optimizer: Optimizer | None = None) -> None:
        """The explicit form of `attach`: call it after each optimizer step that was not skipped.

        Args:
            optimizer: Given, its state of dead entries is cleared when the masks freeze. l1 needs it, before the
                learning-rate schedule's step, and so does straight-through regrowth.

        Raises:
            RuntimeError: An optimizer is attached.
            TypeError: No optimizer under l1 or straight-through regrowth.
        """
        if self._hook is not None:
            raise RuntimeError("Sparsifier: an optimizer is attached, so step() must not be called by hand")
        self._stepped_by_hand = True
        self._advance(None if optimizer is None else raw_optimizer(optimizer))

    def close(self) -> None:
        """Ends the training: detaches, and warns if it ended before the masks were frozen."""
        self.detach()
        if not self._frozen:
            target = self.options.target_sparsity
            missed = "" if target is None else f"target_sparsity={target} was not reached and "
            warnings.warn(
                f"training ended after {self._step_count} optimizer steps, before the sparsity schedule's end at step "
                f"{self.end_step}: {missed}no mask was frozen (sparsity is {self.sparsity:.4f})",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the states of model and optimizer; plain JSON types."""
        dead = [None if mask is None else pack_mask(mask) for mask in self._initial_dead]
        counts = {"step_count": self._step_count, "frozen": self._frozen}
        return {**counts, "initial_dead": dead, "method": self._method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`. Load the model's weights first: their zeros freeze masks, which this corrects.

        Straight-through regrowth also needs the optimizer's state, loaded before the next step; without it it warns.

        If layers are sharded (FSDP2), all processes must call it.

        Raises:
            ValueError: The state is of a model with other layers, or malformed.
        """
        _check_state(state)
        layers, packed = kron_layers(self._model), state["initial_dead"]
        if len(packed) != len(layers):
            raise ValueError(f"the sparsity state is of {len(packed)} Kronecker layers, this model has {len(layers)}")
        self._initial_dead = [
            None if text is None else unpack_mask(text, layer.s) for text, layer in zip(packed, layers, strict=True)
        ]
        self._method.load_state_dict(state.get("method", {}), layers)
        self._step_count, self._frozen = int(state["step_count"]), bool(state["frozen"])
        for layer, initial in zip(layers, self._initial_dead, strict=True):
            if self._frozen:
                layer.freeze_mask()
            else:
                layer.dead_blocks = None if initial is None else initial.clone()
        self._frozen_sparsity = self.sparsity if self._frozen else None

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not overflowed(optimizer):
            self._advance(optimizer)

    @torch.no_grad()
    def _advance(self, optimizer: Optimizer | None) -> None:
        self._step_count += 1
        step, layers = self._step_count, kron_layers(self._model)  # FSDP2 and loading may have replaced parameters
        if self._frozen or step <= self.start_step:
            return
        if step < self.end_step:
            self._method.advance(layers, self._initial_dead, step, optimizer)
            return
        dead = self._method.finish(layers, self._initial_dead, step, optimizer)
        self._frozen, self._frozen_sparsity = True, share_of_entries(layers, dead)
        for layer, mask in zip(layers, dead, strict=True):
            layer.freeze_mask(mask)
            if optimizer is not None:
                for parameter in (layer.s, layer.a):
                    clear_state(optimizer, parameter, mask.expand(parameter.shape))


def _check_whole(layers: list[KronLayer]) -> None:
    for layer in layers:
        if layer.s.shape != (layer.out_blocks, layer.in_blocks):
            raise ValueError(
                f"an S of shape {[layer.out_blocks, layer.in_blocks]} has been flattened to {list(layer.s.shape)}: "
                "FSDP version 1 and DeepSpeed ZeRO-3 hide the parameters; use fsdp_version 2, or ZeRO-1/2"
            )


def _check_state(state: object) -> None:
    """Says what is wrong with a state that was read from a damaged file."""
    content = state if isinstance(state, Mapping) else {}
    masks, step, frozen = (content.get(key) for key in ("initial_dead", "step_count", "frozen"))
    if not isinstance(content.get("method", {}), Mapping):
        raise ValueError("the sparsity state is malformed: method must be a mapping")
    if not isinstance(masks, list) or not all(mask is None or isinstance(mask, str) for mask in masks):
        raise ValueError("the sparsity state is malformed: initial_dead must be a list of base64 texts or None")
    if type(step) is not int or step < 0 or type(frozen) is not bool:
        raise ValueError("the sparsity state is malformed: step_count must be a count and frozen a bool")
