"""Callbacks that wire the training-time algorithms into the stock `Trainer`."""

import math
import warnings
from dataclasses import asdict
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from kron_hf.sparsity import Sparsifier, SparsityOptions
from kron_hf.sparsity.pruning import model_sparsity

__all__ = ["SparsityCallback", "StatefulCallback", "sparsity_arguments"]


class StatefulCallback(TrainerCallback, ExportableState):
    """A callback whose `state` Trainer keeps in trainer_state.json, and that continues from it by itself.

    Trainer sets attributes only under `restore_callback_states_from_checkpoint`; the file's copy is there either way.
    """

    def saved_attributes(self, state: TrainerState) -> dict[str, Any]:
        """The "attributes" of this callback in the checkpoint that the training was resumed from; {} without one.

        Raises:
            ValueError: The file has states of two such callbacks, or a malformed one.
        """
        saved = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        if isinstance(saved, list):
            raise ValueError(f"the checkpoint holds the states of {len(saved)} {type(self).__name__}s; use one")
        attributes = saved.get("attributes") if isinstance(saved, dict) else None
        if saved is not None and not isinstance(attributes, dict):
            raise ValueError(f"trainer_state.json: the state of {type(self).__name__} is malformed")
        return attributes or {}

    @staticmethod
    def names_in(state: TrainerState) -> set[str]:
        """The names of the callbacks whose states a training keeps."""
        return set(cast(dict[str, Any], state.stateful_callbacks))

    def register(self, state: TrainerState) -> None:
        """Trainer fails to save when it resumed from a checkpoint of a run without this callback; call it then.

        Raises:
            ValueError: The training has another such callback.
        """
        name, callbacks = type(self).__name__, cast(dict[str, Any], state.stateful_callbacks)
        if isinstance(found := callbacks.setdefault(name, self.state()), list):
            raise ValueError(f"this training has {len(found)} {name}s, each of which would change the model; use one")


def sparsity_arguments(state: TrainerState) -> dict[str, Any]:
    """The arguments of the `SparsityCallback` of a training; {} without one."""
    saved = cast(dict[str, Any], state.stateful_callbacks or {}).get("SparsityCallback")
    return dict(saved["args"]) if isinstance(saved, dict) else {}


class SparsityCallback(StatefulCallback):
    """Trains the Kronecker layers to block sparsity under the stock `Trainer`; see `Sparsifier`.

    The schedule counts the optimizer steps of the whole training. Logs get a `sparsity`: the share of entries in zero
    blocks at that moment, so during the ramp, where blocks may grow back, read it at multiples of `interval`.
    `Trainer` calls the integrations of `report_to` before any callback it is given; for them to see it use
    `KronTrainer`, or pass the integration's callback yourself, after this one.

    A resumed training continues bit-equal, whether or not `restore_callback_states_from_checkpoint` is set. (Straight-
    through regrowth: not from FSDP2's SHARDED_STATE_DICT, which loses what the masks hide; that warns.)
    Under the stock `Trainer` `load_best_model_at_end` may load a checkpoint from before the masks froze: that warns,
    before the training and after it. Evaluate only afterwards (`eval_delay`) to keep such checkpoints out.
    `KronTrainer` does not compare them.

    Args:
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        l1: Weight of the l1 penalty on S, the paper's mode. Give exactly one of `target_sparsity` and `l1`.
        scope: "global" ranks the blocks of all layers together; "layer" takes the same share from each layer.
        start: Start of the ramp, or of the penalty, as a share of the training steps.
        end: Its end, where the masks freeze, as a share of the training steps.
        interval: Optimizer steps between two prunings, or two rescalings of S against A under l1.
        regrowth: "interval" or, with a target, "straight_through".
        group_penalty: How much whole rows or columns of S count against single blocks, in [0, 1].
        groups: "rows" (output features), "columns" (input features) or "both".

    Raises:
        ValueError: An option is out of range. What depends on the model and the number of steps is checked when the
            training begins.

    Example:
        >>> SparsityCallback(target_sparsity=0.5).state()["args"]["interval"]
        10
    """

    guarded = False  # whether the trainer compares only models whose masks are frozen

    def __init__(
        self,
        *,
        target_sparsity: float | None = None,
        l1: float | None = None,
        scope: str = "global",
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
        self.sparsifier: Sparsifier | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in trainer_state.json."""
        # Trainer sets attributes when it restores callbacks itself; on_train_begin reads the file's copy either way.
        saved = None if self.sparsifier is None else self.sparsifier.state_dict()
        return {"args": asdict(self.options), "attributes": {"sparsifier_state": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds the Sparsifier, continues it if the training was resumed, and attaches it to the optimizer."""
        if self.sparsifier is not None:
            self.sparsifier.detach()  # a training that did not reach its end
        self.sparsifier = Sparsifier(kwargs["model"], total_steps=state.max_steps, **asdict(self.options))
        if state.global_step > 0:
            self.sparsifier.load_state_dict(
                self.saved_attributes(state).get("sparsifier_state") or self._begun_without(self.sparsifier, state)
            )
        self.register(state)
        self.sparsifier.attach(kwargs["optimizer"])
        self._check_best(args, state, self.sparsifier.end_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds `sparsity` to the logs and to the history, into which Trainer has copied them before."""
        if "sparsity" not in kwargs["logs"]:  # under FSDP2 it costs an all-gather
            kwargs["logs"]["sparsity"] = model_sparsity(kwargs["model"])
        if state.log_history:
            state.log_history[-1].setdefault("sparsity", kwargs["logs"]["sparsity"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches; warns if the training ended before the target or the best model loaded is from before it."""
        if self.sparsifier is None:
            return
        self.sparsifier.close()
        if self.sparsifier.frozen_sparsity is not None:
            self._check_final(kwargs["model"], self.sparsifier.frozen_sparsity, state)

    def _check_best(self, args: TrainingArguments, state: TrainerState, end_step: int) -> None:
        """Warns while there is time to mend it."""
        by_epochs = args.eval_strategy == IntervalStrategy.EPOCH  # then eval_delay counts them
        unit, steps = ("epochs", state.max_steps / state.num_train_epochs) if by_epochs else ("steps", 1)
        if not args.load_best_model_at_end or self.guarded or args.eval_delay * steps >= end_step:
            return
        # Trainer counts endless epochs of data without a length.
        needed = f"eval_delay={math.ceil(end_step / steps)} ({unit})" if steps >= 1 else "an eval_delay"
        warnings.warn(
            "load_best_model_at_end may end the training with a checkpoint from before the masks freeze, at step "
            f"{end_step} of {state.max_steps}: pass {needed} to TrainingArguments, so that only later ones count",
            stacklevel=2,
        )

    def _check_final(self, model: nn.Module, frozen: float, state: TrainerState) -> None:
        sparsity, target, l1 = model_sparsity(model), self.options.target_sparsity, self.options.l1
        if sparsity < frozen:
            goal = f"{frozen:.4f} as l1={l1} gave" if target is None else f"target_sparsity={target}"
            warnings.warn(
                f"the model has sparsity {sparsity:.4f}, not {goal}: the best checkpoint, "
                f"{state.best_model_checkpoint}, is from before the masks froze; pass eval_delay to TrainingArguments "
                "so that only later ones are compared",
                stacklevel=2,
            )

    @staticmethod
    def _begun_without(sparsifier: Sparsifier, state: TrainerState) -> dict[str, Any]:
        """The checkpoint is of a run without this callback: what is frozen in it was frozen before."""
        return {**sparsifier.state_dict(), "step_count": state.global_step}
