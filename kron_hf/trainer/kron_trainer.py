"""`KronTrainer`: the stock Trainer with the settings that Kronecker layers want.

One private method of transformers' Trainer is overridden: `_determine_best_metric`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kron_hf.callbacks import SparsityCallback
from kron_hf.distillation import DistillationConfig
from kron_hf.model_card import ModelCardCallback, add_usage
from kron_hf.param_groups import kron_param_groups
from kron_hf.selection.groups import candidate_layers
from kron_hf.sparsity.pruning import kron_layers, model_sparsity
from kron_hf.trainer.distilling import Distilling
from kron_hf.trainer.hidden_token import HiddenToken

__all__ = ["KronTrainer"]


class KronTrainer(Distilling):
    """`transformers.Trainer` with `kron_param_groups`, and with a `SparsityCallback` if a target or l1 is given.

    What it pushes to the Hub carries the line `import kron_hf` in its card, and never `args.hub_token`, which the
    stock Trainer publishes in `training_args.bin`.

    Everything else, `args.optim`, its settings and the learning-rate schedule among them, is Trainer's. Logs carry
    `sparsity` for all integrations, but not while a block size is selected. No checkpoint is ever half-written
    (`SafeSaving`), and none whose masks are not frozen yet becomes the best model of `load_best_model_at_end`. A model
    without Kronecker layers trains as under Trainer.

    With a `teacher` the loss, in training and evaluation, is a `DistillationLoss`, and logs carry its parts, as
    `distill_tokens`. Data without labels will do: for a model with a head set `TrainingArguments(label_names=[])` to
    have a loss in evaluation. A student that was calibrated takes about 1e-5 with `factor_lr=1`: higher rates lose what
    was fitted.

    Args:
        *args: As for `Trainer`.
        factor_lr: Factor of the learning rate of A and B.
        mask_lr: Factor of the learning rate of S, which gets no weight decay.
        target_sparsity: Block sparsity to train to, in [0, 1).
        l1: Weight of the l1 penalty on S, the paper's mode. Without this and a target the masks are left alone.
        sparsity_options: Further arguments of `SparsityCallback`: scope, start, end, interval, regrowth,
            group_penalty, groups.
        teacher: What to distil from: a model apart from the student, such as a copy made before `get_kron_model`, or
            the name or folder of a checkpoint of the student's class. It goes to the device of the training if it is
            on the CPU; it is not saved, so pass it again when you resume.
        distillation: Weights and options, a `DistillationConfig` or a dictionary of its arguments; by default all that
            both models give.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: `target_sparsity` and `l1` together, `sparsity_options` without either, or `args.optim` names an
            optimizer that makes its own parameter groups (GaLore, LOMO, ...), `distillation` without a teacher, or
            the teacher is the student or shares parameters with it.
    """

    def __init__(
        self,
        *args: Any,
        factor_lr: float = 4.0,
        mask_lr: float = 1.0,
        target_sparsity: float | None = None,
        l1: float | None = None,
        sparsity_options: dict[str, Any] | None = None,
        teacher: nn.Module | str | os.PathLike[str] | None = None,
        distillation: DistillationConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        callback = None
        if target_sparsity is not None or l1 is not None:
            callback = SparsityCallback(target_sparsity=target_sparsity, l1=l1, **(sparsity_options or {}))
        elif sparsity_options:
            raise ValueError(f"sparsity_options={sparsity_options!r} need a target_sparsity or an l1")
        super().__init__(*args, teacher=teacher, distillation=distillation, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = HiddenToken(self.args.hub_token)
        self.factor_lr, self.mask_lr = factor_lr, mask_lr
        if callback is not None:
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        for callback in self._sparsity_callbacks():
            callback.guarded = True
        return super().train(*args, **kwargs)

    def _sparsity_callbacks(self) -> list[SparsityCallback]:
        return [item for item in self.callback_handler.callbacks if isinstance(item, SparsityCallback)]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compares only models whose masks are frozen: before that the model is denser than was asked for."""
        if any(item.sparsifier is not None and not item.sparsifier.frozen for item in self._sparsity_callbacks()):
            return False
        return super()._determine_best_metric(metrics, trial)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer on `kron_param_groups`; an optimizer or groups passed to Trainer are left alone."""
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is not None or (given is not None and "params" in given[1]):
            return super().create_optimizer(model)
        target = cast(PreTrainedModel, self.model if model is None else model)
        optimizer_cls, options = given or self.get_optimizer_cls_and_kwargs(self.args, target)
        own_groups = {"params", "model", "optimizer_dict"} & options.keys()
        if own_groups or not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
            raise ValueError(
                f"KronTrainer sets learning rates by parameter group, but the optimizer of optim={self.args.optim!r} "
                "makes its own groups; use another optimizer, or transformers.Trainer"
            )
        groups = kron_param_groups(
            target,
            self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            factor_lr=self.factor_lr,
            mask_lr=self.mask_lr,
        )
        self.optimizer_cls_and_kwargs = (optimizer_cls, {**options, "params": groups})
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given  # with model_init the next training makes another optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `sparsity` before any integration sees the logs."""
        model = cast(nn.Module, self.model)
        # In a block-size selection a zero block of a candidate makes none of W.
        if kron_layers(model) and not candidate_layers(model) and "sparsity" not in logs:
            logs["sparsity"] = model_sparsity(model)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's card, with how to load Kronecker layers; that of a `ModelCardCallback`, if there is one."""
        super().create_model_card(*args, **kwargs)
        model, card = cast(nn.Module, self.model), Path(str(self.args.output_dir), "README.md")
        if not self.is_world_process_zero() or not kron_layers(model):
            return
        ours = next((item for item in self.callback_handler.callbacks if isinstance(item, ModelCardCallback)), None)
        if ours is not None and not self.is_fsdp_enabled:
            ours.write(self.accelerator.unwrap_model(model), self.args, self.state)
        else:
            name = self.hub_model_id or kwargs.get("model_name") or card.parent.name
            add_usage(card, model, name, layers=not self.is_fsdp_enabled)  # the other processes are not here
