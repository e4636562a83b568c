"""`BlockSizeCallback`: block size and rank chosen during a training under the stock `Trainer`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from kron_hf.callbacks import StatefulCallback
from kron_hf.checkpoint import attach_kron_config
from kron_hf.config import KronConfig
from kron_hf.held_out_loss import HeldOutLoss, used_columns
from kron_hf.selection import BlockSizeSelector, SelectionOptions, SelectionResult, replace_by_chosen
from kron_hf.selection.groups import candidate_layers
from kron_hf.selection.restart import continue_schedule
from kron_hf.sharding import is_sharded, reshard

__all__ = ["BlockSizeCallback"]

RESULT_FILE = "block_size_selection.json"


class BlockSizeCallback(StatefulCallback):
    """Chooses block size and rank of a model with candidates under the stock `Trainer`; see `BlockSizeSelector`.

    For a model of `get_kron_model(model, KronConfig(candidate_block_sizes=[...], candidate_ranks=[...]))`. When one
    candidate is left, each layer becomes a plain `KronLinear` (in one process at once; under DDP when the training
    ends; under FSDP2 it stays a `KronCandidates` with one candidate, which `kron_hf.selection.replace_by_chosen`
    converts after loading), and `block_size_selection.json` is written into `args.output_dir`.

    Logs get `candidates_left` and, until then, the norm of every candidate left. Checkpoints load at any time with
    `from_pretrained`, and a resumed training continues bit-equal. At every drop Trainer's record of the best checkpoint
    starts anew: an earlier one is of another model.

    Args:
        mode: "validation" drops, one at a time, the candidate whose removal raises held-out loss least; "penalty", the
            paper's, shrinks the candidates until one is left.
        eval_dataset: Held-out data for "validation", with `len` and integer indices. Neither the training nor
            the test set: it decides.
        eval_batches: How many batches of `args.per_device_eval_batch_size` rows, evenly over `eval_dataset`, an
            evaluation takes. Each drop costs one evaluation for each candidate left, with `scope="layer"` one for each
            in each layer.
        data_collator: Makes batches of `eval_dataset`; None: as the training's.
        scope: "global" chooses one candidate for all layers, "layer" one for each.
        cost: What a candidate costs: "params", "flops", "latency" (measured), or None.
        cost_weight: What that is worth; in "validation" the loss without a candidate that its cost, as a share of dense
            layers', weighs against. Leaving one out of a model trained with it raises the loss by much more than
            training without it would, so weights above 1 are usual.
        penalty_weights: In "penalty" what candidates are weighted by: "norm", their norm at the start, or "size", the
            paper's square root of their number of entries.
        start: Start of the selection as a share of the training steps.
        end: Its end as a share of the training steps.
        restart: Whether the winner's factors are drawn anew and the learning-rate schedule runs again over the rest.
            None: after a penalty, which has shrunk it, but not in "validation", where going on is the better start.
        seed: Of the winner's new factors.

    Attributes:
        selector: The `BlockSizeSelector` of the training.
        result: A `SelectionResult`, once one candidate is left: `str()` is a table, `plot(path)` draws the norms.
        config: A `KronConfig` with which `get_kron_model` makes the chosen layers in a fresh model, once one is left.

    Raises:
        ValueError: An option is out of range, or validation without `eval_dataset`. What depends on the model and the
            number of steps is checked when the training begins.

    Example:
        >>> BlockSizeCallback(mode="penalty").options.end
        0.5
    """

    def __init__(
        self,
        mode: str = "validation",
        eval_dataset: Any = None,
        *,
        eval_batches: int = 8,
        data_collator: Any = None,
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
        if mode == "validation" and eval_dataset is None:
            raise ValueError(
                "BlockSizeCallback(mode='validation') compares candidates by held-out loss: pass eval_dataset=, a part "
                "of the data that is neither trained nor tested on, or mode='penalty'. (Checkpoints do not hold it: "
                "pass the callback anew, without restore_callback_states_from_checkpoint; it continues by itself)"
            )
        if isinstance(eval_dataset, Mapping):
            raise ValueError(
                f"BlockSizeCallback decides by one eval_dataset, got a {type(eval_dataset).__name__} of "
                f"{len(eval_dataset)}: pass one of them"
            )
        if eval_dataset is not None and not (hasattr(eval_dataset, "__len__") and hasattr(eval_dataset, "__getitem__")):
            raise ValueError(
                "BlockSizeCallback takes rows evenly over eval_dataset, by their numbers: it must have len and integer "
                f"indices, got a {type(eval_dataset).__name__}"
            )
        if type(eval_batches) is not int or eval_batches < 1:
            raise ValueError(f"eval_batches must be a positive int, got {eval_batches!r}")
        self.eval_dataset, self.eval_batches, self.data_collator = eval_dataset, eval_batches, data_collator
        self.selector: BlockSizeSelector | None = None
        self.result: SelectionResult | None = None
        self.config: KronConfig | None = None
        self._held_out: HeldOutLoss | None = None
        self._finished_state: dict[str, Any] | None = None  # of a selection that a checkpoint had finished
        self._drops_seen = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in trainer_state.json."""
        saved = self._finished_state if self.selector is None else self.selector.state_dict()
        options = {**asdict(self.options), "eval_batches": self.eval_batches}
        return {"args": options, "attributes": {"selector_state": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds the selector, continues it if the training was resumed, and attaches it to the optimizer."""
        model, optimizer, scheduler = kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"]
        if self.selector is not None:
            self.selector.detach()  # a training that did not reach its end
        saved = self.saved_attributes(state).get("selector_state") if state.global_step > 0 else None
        if not candidate_layers(model) and (saved is not None or self.result is not None):
            self._continue_with_chosen(saved, scheduler)
        else:
            self._begin(args, state, model, kwargs["train_dataloader"])
            assert self.selector is not None
            if state.global_step > 0:
                self.selector.load_state_dict(saved or {**self.selector.state_dict(), "step_count": state.global_step})
            self.selector.attach(optimizer, scheduler)
            self._drops_seen = self.selector.drop_count
            if self.selector.done:
                self._finish(args, state, model)
        self.register(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a drop: what is saved from now on is described anew, and an older best checkpoint is forgotten."""
        if self.selector is None or self.selector.drop_count == self._drops_seen:
            return
        self._drops_seen = self.selector.drop_count
        if self._held_out is not None:
            self._held_out.clear()
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        attach_kron_config(kwargs["model"])
        if self.selector.done:
            self._finish(args, state, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds `candidates_left` and norms to the logs, and to the history, into which Trainer has copied them."""
        found: dict[str, float] = {"candidates_left": 1}
        if self.selector is not None and not self.selector.done:
            found["candidates_left"] = self.selector.candidates_left
            found |= {f"norm_{label}": norm for label, norm in self.selector.norms().items()}
        for logs in (kwargs["logs"], *state.log_history[-1:]):
            logs.update({name: value for name, value in found.items() if name not in logs})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches, makes plain layers if that had to wait, and warns if the training ended before the selection."""
        if self.selector is None:
            return
        self.selector.close()
        if self.selector.done:
            self._replace(kwargs["model"])

    def _begin(self, args: TrainingArguments, state: TrainerState, model: nn.Module, train_dataloader: Any) -> None:
        if args.deepspeed:
            raise ValueError("block-size selection does not run under DeepSpeed; use DDP or FSDP2")
        evaluate: Callable[[], float] | None = None
        if self.options.mode == "validation":
            self._held_out = HeldOutLoss(
                self.eval_dataset,
                batches=self.eval_batches,
                batch_size=args.per_device_eval_batch_size,
                collate=self.data_collator or train_dataloader.collate_fn,
                columns=used_columns(model, args.label_names or []) if args.remove_unused_columns else None,
                processes=args.world_size,
                process=args.process_index,
            )
            evaluate = partial(self._held_out.value, model, args.device)
        options = asdict(self.options)
        self.selector = BlockSizeSelector(model, total_steps=state.max_steps, evaluate=evaluate, **options)
        self.result = self.config = None

    def _continue_with_chosen(self, saved: Any, scheduler: Any) -> None:
        """The model is one in which the choice was made before; its schedule may run for the second time."""
        self.selector = None
        if saved is None:
            return
        self.result = SelectionResult.from_state(saved)
        self.config, self._finished_state = KronConfig.from_modules(self.result.modules), dict(saved)
        continue_schedule(scheduler, saved)

    def _finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        assert self.selector is not None
        self.result = self.selector.result
        self.config = KronConfig.from_modules(self.result.modules)
        if state.is_world_process_zero:
            path = Path(str(args.output_dir), RESULT_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{dist.get_rank() if dist.is_initialized() else 0}")
            unfinished.write_text(json.dumps(self.result.to_dict(), indent=2))
            unfinished.replace(path)
        if not (dist.is_available() and dist.is_initialized()):
            self._replace(model)

    @staticmethod
    def _replace(model: nn.Module) -> None:
        # FSDP2 gathers the parameters of the modules that it was given.
        reshard(model)  # after an evaluation it may hold whole ones
        if candidate_layers(model) and not any(map(is_sharded, model.parameters())):
            replace_by_chosen(model)
            attach_kron_config(model)
