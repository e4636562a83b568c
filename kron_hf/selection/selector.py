"""`BlockSizeSelector`: block size and rank chosen in one training, until one candidate is left."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kron_hf.selection.candidate_set import CandidateSet
from kron_hf.selection.costs import Costs
from kron_hf.selection.options import SelectionOptions
from kron_hf.selection.penalty import Penalty
from kron_hf.selection.restart import forget, redraw, remaining_share, run_schedule_again, schedule_of
from kron_hf.selection.result import SelectionResult
from kron_hf.selection.selector_state import checked_state
from kron_hf.selection.validation import Validation
from kron_hf.sparsity.optimizer_state import overflowed, raw_optimizer

__all__ = ["BlockSizeSelector"]

RECORDS = 100  # points of the norms' curves until the end of the selection


class BlockSizeSelector:
    """Chooses one of the candidates of every `KronCandidates` layer of a model during training.

    With `mode="validation"`, at equally spaced steps from `start` to `end` the candidate goes whose removal raises
    held-out loss least, counting what it costs: the smallest `loss_without(k) - cost_weight * cost(k)`, where `cost(k)`
    is its share of the dense cost of all these layers. An event costs one evaluation for each candidate left, with
    `scope="layer"` one for each candidate left in each layer.

    With `mode="penalty"`, the paper's, a group proximal step on each candidate's whole factor set follows every
    optimizer step from `start` to `end`, and grows until one is left; see `kron_hf.selection.penalty`.

    Candidates that go leave the optimizer at once; in one process their memory is freed, else (DDP, FSDP2) they stay
    as zeros without optimizer state and out of the computation. All decisions are the same on all processes. With
    `restart` the factors of the winner are then drawn anew, the optimizer forgets them, and the learning-rate schedule
    runs again over the remaining steps; embeddings, norms, biases and head go on.

    Afterwards `kron_hf.selection.replace_by_chosen(model)` makes plain `KronLinear` layers of what is left.

    Args:
        model: A model with `KronCandidates` layers, at any depth, also wrapped by DDP, FSDP2 or `torch.compile`.
        mode: "validation" or "penalty".
        scope: "global" chooses one candidate for all layers, "layer" one for each.
        cost: What a candidate costs beside the dense layer: "params" (S, A and B), "flops" (per token, forward) or
            "latency" (of a forward of 1,024 tokens, measured once on rank 0). None counts the loss alone.
        cost_weight: In "validation" the loss without a candidate that the whole dense cost is worth. Leaving one out of
            a model trained with it costs more than training without it would, so weights above 1 are usual. In
            "penalty" by how much a candidate that costs as much as dense layers is penalised more,
            `w_k = u_k * (1 + cost_weight * cost_k)`.
        penalty_weights: In "penalty" what u_k is: "norm", the candidate's norm at the start, or "size", the paper's
            square root of its number of entries.
        total_steps: Optimizer steps of the whole training.
        start: Start of the selection as a share of `total_steps`.
        end: Its end, when one candidate is left, as a share of `total_steps`.
        evaluate: Gives the held-out loss of the model as it is; called in eval mode without gradients. In a
            distributed training the mean over the processes counts.
        restart: Whether the winner begins again. None: after a penalty, which has shrunk it, but not otherwise.
        seed: Of the winner's new factors.

    Raises:
        ValueError: An option is out of range, validation without `evaluate`, nothing to choose in the model, or a
            training that is shorter than the drops need.

    Example:
        >>> import torch
        >>> from kron_hf.selection import BlockSizeSelector, KronCandidates
        >>> model = KronCandidates(16, 16, [(2, 1), (4, 1), (8, 1)])
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> x = torch.randn(32, 16)
        >>> selector = BlockSizeSelector(model, total_steps=40, evaluate=lambda: float(model(x).square().mean()))
        >>> selector.attach(optimizer)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        >>> selector.close()
        >>> len(model.alive)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        evaluate: Callable[[], float] | None = None,
        mode: str = "validation",
        scope: str = "global",
        cost: str | None = None,
        cost_weight: float = 0.0,
        penalty_weights: str = "norm",
        start: float = 0.1,
        end: float = 0.5,
        restart: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.options = SelectionOptions(
            mode=mode,
            scope=scope,
            cost=cost,
            cost_weight=cost_weight,
            penalty_weights=penalty_weights,
            start=start,
            end=end,
            restart=restart,
            seed=seed,
        )
        if mode == "validation" and evaluate is None:
            raise ValueError("mode='validation' needs evaluate=, a function that gives the held-out loss; or 'penalty'")
        self._total_steps = total_steps
        self._set = CandidateSet(model, scope)
        drops = self._set.drops
        self.start_step, self.end_step = self.options.span(total_steps, drops)
        if cost is not None:
            self._set.costs = Costs.of(self._set.layers, cost)
        self._variances = self._set.weight_variances()  # to which the winners are drawn anew
        self._method: Validation | Penalty = (
            Penalty(self._set, penalty_weights, cost_weight, self.start_step, self.end_step)
            if evaluate is None or mode == "penalty"
            else Validation(self._set, model, evaluate, cost_weight, (self.start_step, self.end_step, drops))
        )
        self._step_count = 0
        self._restarted_at: int | None = None  # epoch of the schedule
        self._events: list[dict[str, Any]] = []
        self._record: dict[str, list[Any]] = {"steps": [], "norms": []}
        self._scheduler: Any = None
        self._hooks: list[RemovableHandle] = []
        self._stepped_by_hand = False

    @property
    def done(self) -> bool:
        """Whether one candidate is left everywhere."""
        return all(len(left) == 1 for left in self._set.alive_keys())

    @property
    def step_count(self) -> int:
        """Optimizer steps counted so far; steps skipped for an fp16 overflow are not among them."""
        return self._step_count

    @property
    def candidates_left(self) -> int:
        """The largest number of candidates left in a layer."""
        return max(map(len, self._set.alive_keys()))

    @property
    def drop_count(self) -> int:
        """Drops so far."""
        return len(self._events)

    @property
    def result(self) -> SelectionResult:
        """What has been chosen so far, and how."""
        return SelectionResult.from_state(self.state_dict())

    def norms(self) -> dict[str, float]:
        """`||theta_k||` of the candidates left, by name, over all layers; if sharded, all processes must ask."""
        squares: dict[str, float] = {}
        for choice, norms in enumerate(self._set.norms()):
            for k, norm in norms.items():
                label = self._set.label(choice, k)
                squares[label] = squares.get(label, 0.0) + norm**2
        return {label: math.sqrt(square) for label, square in squares.items()}

    def attach(self, optimizer: Optimizer, lr_scheduler: Any = None) -> None:
        """Runs after every real step of `optimizer` from now on (Accelerate's wrapper is looked through).

        Args:
            optimizer: The optimizer.
            lr_scheduler: The learning-rate schedule, a `LambdaLR`, which `restart` runs again; None: it is left alone.

        Raises:
            RuntimeError: It is attached already, or `step` was called by hand.
            TypeError: Not a torch optimizer; or `restart`, and another kind of schedule.
        """
        if self._hooks or self._stepped_by_hand:
            raise RuntimeError(
                "BlockSizeSelector: either attach one optimizer or call step() after each step, never both"
            )
        optimizer = raw_optimizer(optimizer)
        if lr_scheduler is not None and self.options.restarts:
            self._scheduler = schedule_of(lr_scheduler)
            if self._restarted_at is not None:
                self._run_schedule_again()
        self._set.leave_optimizer(optimizer)
        self._hooks = [
            optimizer.register_step_post_hook(self._after_step),
            # Accelerate loads the model first, then the optimizer, whose groups must be those that were saved.
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, _: self._set.leave_optimizer(optimizer)),
        ]

    def detach(self) -> None:
        """Removes the hooks from the optimizer, if there are any."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def step(self, optimizer: Optimizer | None = None) -> None:
        """The explicit form of `attach`: call it after each optimizer step that was not skipped.

        Args:
            optimizer: Given, candidates that go leave it.

        Raises:
            RuntimeError: An optimizer is attached.
        """
        if self._hooks:
            raise RuntimeError("BlockSizeSelector: an optimizer is attached, so step() must not be called by hand")
        self._stepped_by_hand = True
        self._advance(None if optimizer is None else raw_optimizer(optimizer))

    def close(self) -> None:
        """Ends the training: detaches, and warns if it ended before one candidate was left."""
        self.detach()
        if not self.done:
            warnings.warn(
                f"training ended after {self._step_count} optimizer steps, before the selection's end at step "
                f"{self.end_step}: {self.candidates_left} candidates are left",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's weights; plain JSON types."""
        return {
            "options": asdict(self.options),
            "step_count": self._step_count,
            "total_steps": self._total_steps,
            "names": self._set.names,
            "shapes": self._set.shapes,
            "sizes": self._set.sizes,
            "alive": self._set.alive_keys(),
            "variances": self._variances,
            "costs": None if self._set.costs is None else asdict(self._set.costs),
            "method": self._method.state_dict(),
            "restarted_at": self._restarted_at,
            "events": [dict(event) for event in self._events],
            "record": {name: list(values) for name, values in self._record.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`. Load the model's weights first, and call it before `attach`.

        Raises:
            ValueError: The state is of a model with other layers or candidates, or malformed.
        """
        state = checked_state(state)
        self._set.keep_only(state["sizes"], state["alive"])
        self._variances = state["variances"]
        if state["costs"] is not None:
            self._set.costs = Costs(**state["costs"])
        self._method.load_state_dict(state["method"])
        self._events = [dict(event) for event in state["events"]]
        self._record = {name: list(state["record"][name]) for name in ("steps", "norms")}
        self._step_count, self._restarted_at = state["step_count"], state["restarted_at"]
        if self._scheduler is not None and self._restarted_at is not None:
            self._run_schedule_again()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not overflowed(optimizer):
            self._advance(optimizer)

    @torch.no_grad()
    def _advance(self, optimizer: Optimizer | None) -> None:
        self._step_count += 1
        if self.done:
            return
        self._take_down_norms()
        if self._step_count <= self.start_step:
            return
        self._method.advance(self._step_count, lambda choice, k, losses: self._drop(choice, k, losses, optimizer))
        if self.done:
            self._take_down_norms(always=True)
            if self.options.restarts:
                self._restart(optimizer)

    def _drop(self, choice: int, k: int, losses: dict[int, float], optimizer: Optimizer | None) -> None:
        layers = self._set.choices[choice]
        self._events.append(
            {
                "step": self._step_count,
                "layer": None if self.options.scope == "global" else self._set.names[layers[0]],
                "dropped": self._set.label(choice, k),
                "losses_without": {self._set.label(choice, each): loss for each, loss in losses.items()},
            }
        )
        self._set.drop(choice, k, optimizer)

    def _take_down_norms(self, always: bool = False) -> None:
        every = max(1, self.end_step // RECORDS)
        if not always and self._step_count % every and self._step_count != 1:
            return
        rows = [{self._set.label(c, k): norm for k, norm in own.items()} for c, own in enumerate(self._set.norms())]
        self._record["steps"].append(self._step_count)
        self._record["norms"].append(rows)

    def _restart(self, optimizer: Optimizer | None) -> None:
        generator = torch.Generator().manual_seed(self.options.seed)
        for index, variance in enumerate(self._variances):
            layer = self._set.last(index)
            redraw(layer, variance, generator)
            if optimizer is not None:
                forget(optimizer, [layer.s, layer.a, layer.b], leave=False)
        if self._scheduler is not None:
            # The schedule steps after this; it may count more than one epoch a step (Accelerate).
            done, steps = self._scheduler.last_epoch, self._step_count
            self._restarted_at = round(done * steps / (steps - 1)) if steps > 1 else done + 1
            self._run_schedule_again()

    def _run_schedule_again(self) -> None:
        assert self._restarted_at is not None
        run_schedule_again(self._scheduler, self._restarted_at, remaining_share(self.state_dict()))
