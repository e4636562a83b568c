"""Training to an exact block sparsity: a cubic ramp on true block norms, then a frozen mask."""

import base64
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kron_hf.layers import KronLinear
from kron_hf.pruning import (
    SCOPES,
    block_entries,
    choose_dead,
    cubic_sparsity,
    kron_layers,
    model_sparsity,
    required_entries,
)

__all__ = ["Sparsifier", "SparsityOptions"]


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """The options of a `Sparsifier`, checked; see there.

    Raises:
        ValueError: An option is outside its range.
    """

    target_sparsity: float
    scope: str = "global"
    start: float = 0.05
    end: float = 0.5
    interval: int = 10

    def __post_init__(self) -> None:
        target = self.target_sparsity
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 <= float(target) < 1:
            raise ValueError(f"target_sparsity must be a number in [0, 1), got {target!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        for name, value in (("start", self.start), ("end", self.end)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= float(value) <= 1:
                raise ValueError(f"{name} must be a share of the training steps in [0, 1], got {value!r}")
        if self.start >= self.end:
            raise ValueError(f"start must be before end, got start={self.start!r}, end={self.end!r}")
        _check_count("interval", self.interval)

    def ramp(self, total_steps: int) -> tuple[int, int]:
        """The steps at which the ramp starts and ends.

        Raises:
            ValueError: The training is too short for one interval of the ramp.
        """
        _check_count("total_steps", total_steps)
        start_step, end_step = round(self.start * total_steps), round(self.end * total_steps)
        if end_step - start_step < self.interval:
            raise ValueError(
                f"training is shorter than the sparsity schedule needs: with total_steps={total_steps} the ramp runs "
                f"from step {start_step} (start={self.start}) to step {end_step} (end={self.end}), which is less than "
                f"one interval of {self.interval} steps; train longer or pass a smaller interval"
            )
        return start_step, end_step


class Sparsifier:
    """Brings the Kronecker layers of a model to a block sparsity during training, then freezes their masks.

    Every `interval` optimizer steps of a cubic ramp the S of the least important blocks is set to exactly zero; between
    two such steps blocks may grow back. At the ramp's end the target is met exactly: at least `target_sparsity` of the
    entries of all Kronecker weights lie in zero blocks, by less than one block more, and no layer is emptied. Then
    `KronLinear.freeze_mask` makes the zeros permanent and the rest of the training fine-tunes what is left.

    Blocks frozen before the training (of a pruned model that was loaded) count towards the target and stay dead. What
    is pruned is a function of the weights and the step alone; ties go by layer order and index.

    Args:
        model: A model with `KronLinear` layers, at any depth, also wrapped by DDP or `torch.compile`.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        total_steps: Optimizer steps of the whole training.
        start: Start of the ramp as a share of `total_steps`.
        end: End of the ramp, where the masks freeze, as a share of `total_steps`.
        interval: Optimizer steps between two prunings.

    Raises:
        ValueError: An option is out of range, the model has no `KronLinear`, the training is shorter than the
            schedule, or the target is impossible without emptying a layer.

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
        target_sparsity: float,
        scope: str = "global",
        total_steps: int,
        start: float = 0.05,
        end: float = 0.5,
        interval: int = 10,
    ) -> None:
        self.options = SparsityOptions(
            target_sparsity=target_sparsity, scope=scope, start=start, end=end, interval=interval
        )
        self.total_steps = total_steps
        self.start_step, self.end_step = self.options.ramp(total_steps)
        self._model = model
        layers = kron_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no KronLinear layers to make sparse; convert it first")
        self._initial_dead = [None if layer.dead_blocks is None else layer.dead_blocks.clone() for layer in layers]
        self._initial_sparsity = self._share_dead_at_start(layers)
        self._check_possible(layers)
        self._step_count = 0
        self._frozen = False
        self._warned = False
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
        inner = getattr(optimizer, "optimizer", None)
        while isinstance(inner, Optimizer):
            optimizer, inner = inner, getattr(inner, "optimizer", None)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Sparsifier.attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Removes the hook from the optimizer, if there is one."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def step(self, optimizer: Optimizer | None = None) -> None:
        """The explicit form of `attach`: call it after each optimizer step that was not skipped.

        Args:
            optimizer: Given, its state of dead entries is cleared when the masks freeze.

        Raises:
            RuntimeError: An optimizer is attached.
        """
        if self._hook is not None:
            raise RuntimeError("Sparsifier: an optimizer is attached, so step() must not be called by hand")
        self._stepped_by_hand = True
        self._advance(optimizer)

    def close(self) -> None:
        """Ends the training: detaches, and warns if it ended before the masks were frozen."""
        self.detach()
        if not self._frozen:
            warnings.warn(
                f"training ended after {self._step_count} optimizer steps, before the sparsity schedule's end at step "
                f"{self.end_step}: target_sparsity={self.options.target_sparsity} was not reached (sparsity is "
                f"{self.sparsity:.4f}) and no mask was frozen",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's weights; plain JSON types."""
        dead = [None if mask is None else _pack(mask) for mask in self._initial_dead]
        return {"step_count": self._step_count, "frozen": self._frozen, "initial_dead": dead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`. Load the model's weights first: their zeros freeze masks, which this corrects.

        Raises:
            ValueError: The state is of a model with other layers, or malformed.
        """
        _check_state(state)
        layers, packed = kron_layers(self._model), state["initial_dead"]
        if len(packed) != len(layers):
            raise ValueError(f"the sparsity state is of {len(packed)} Kronecker layers, this model has {len(layers)}")
        self._initial_dead = [
            None if text is None else _unpack(text, layer) for text, layer in zip(packed, layers, strict=True)
        ]
        self._initial_sparsity = self._share_dead_at_start(layers)
        self._step_count, self._frozen = int(state["step_count"]), bool(state["frozen"])
        for layer, initial in zip(layers, self._initial_dead, strict=True):
            if self._frozen:
                layer.freeze_mask()
            else:
                layer.dead_blocks = None if initial is None else initial.clone()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set on fused optimizers, which skip an overflow themselves
        if found_inf is None or not bool(found_inf):
            self._advance(optimizer)

    @torch.no_grad()
    def _advance(self, optimizer: Optimizer | None) -> None:
        self._step_count += 1
        step, target = self._step_count, self.options.target_sparsity
        if self._frozen:
            return
        if step >= self.end_step:
            self._prune(target)
            self._freeze(optimizer)
        elif step > self.start_step and step % self.options.interval == 0:
            initial, ramp = self._initial_sparsity, {"start_step": self.start_step, "end_step": self.end_step}
            self._prune(cubic_sparsity(step, **ramp, final=target, initial=min(initial, target)))

    def _prune(self, sparsity: float) -> None:
        layers = kron_layers(self._model)
        if self._initial_sparsity > 0 and self._initial_sparsity >= self.options.target_sparsity and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model's frozen masks already have sparsity {self._initial_sparsity:.4f}, which is not below "
                f"target_sparsity={self.options.target_sparsity}: nothing is pruned and nothing revived",
                stacklevel=2,
            )
        masks = choose_dead(layers, self._initial_dead, sparsity, self.options.scope)
        for layer, mask in zip(layers, masks, strict=True):
            layer.s.masked_fill_(mask, 0.0)

    def _freeze(self, optimizer: Optimizer | None) -> None:
        self._frozen = True
        for layer in kron_layers(self._model):
            layer.freeze_mask()
            if optimizer is not None and layer.dead_blocks is not None:
                for parameter in (layer.s, layer.a):
                    _clear_state(optimizer, parameter, layer.dead_blocks)

    def _share_dead_at_start(self, layers: list[KronLinear]) -> float:
        total = sum(layer.s.numel() * block_entries(layer) for layer in layers)
        masks = zip(layers, self._initial_dead, strict=True)
        return sum(int(mask.sum()) * block_entries(layer) for layer, mask in masks if mask is not None) / total

    def _check_possible(self, layers: list[KronLinear]) -> None:
        total = sum(layer.s.numel() * block_entries(layer) for layer in layers)
        masks = zip(layers, self._initial_dead, strict=True)
        kept = sum(block_entries(layer) for layer, mask in masks if mask is None or not bool(mask.all()))
        required = required_entries(self.options.target_sparsity, total)
        if required > total - kept:
            raise ValueError(
                f"target_sparsity={self.options.target_sparsity} needs {required} of {total} entries in zero blocks, "
                f"but with one block kept in each of the {len(layers)} Kronecker layers at most {total - kept} can be "
                f"(sparsity {(total - kept) / total:.4f})"
            )


def _clear_state(optimizer: Optimizer, parameter: nn.Parameter, dead: Tensor) -> None:
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape:
            value.masked_fill_(dead, 0.0)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def _check_state(state: object) -> None:
    """Says what is wrong with a state that was read from a damaged file."""
    content = state if isinstance(state, Mapping) else {}
    masks, step, frozen = (content.get(key) for key in ("initial_dead", "step_count", "frozen"))
    if not isinstance(masks, list) or not all(mask is None or isinstance(mask, str) for mask in masks):
        raise ValueError("the sparsity state is malformed: initial_dead must be a list of base64 texts or None")
    if type(step) is not int or step < 0 or type(frozen) is not bool:
        raise ValueError("the sparsity state is malformed: step_count must be a count and frozen a bool")
    for index, mask in enumerate(masks):
        try:
            base64.b64decode(mask or "", validate=True)
        except ValueError:
            raise ValueError(f"the sparsity state is malformed: initial_dead[{index}] is not base64") from None


def _pack(mask: Tensor) -> str:
    """A bool mask as base64 text, eight blocks a byte."""
    bits = nn.functional.pad(mask.flatten().to("cpu", torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return base64.b64encode(bytes((bits << torch.arange(8, dtype=torch.uint8)).sum(1).tolist())).decode()


def _unpack(text: str, layer: KronLinear) -> Tensor:
    packed = base64.b64decode(text)
    if len(packed) != -(-layer.s.numel() // 8):
        raise ValueError(
            f"the sparsity state has a mask of {len(packed)} bytes for a layer of {layer.s.numel()} blocks"
        )
    bits = torch.tensor(list(packed), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten()[: layer.s.numel()].view(layer.s.shape).bool().to(layer.s.device)
