"""The options of `kron-hf train`: its own groups, then every option of `TrainingArguments`."""

# ruff: noqa: RUF009  # option returns a dataclasses.field, which no instance shares
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from kron_hf.command.options import LayerOptions, PublishedArguments, option

__all__ = ["METRIC", "CommandArguments", "KronOptions", "ModelOptions"]

METRIC = "metric"  # stands for the name of --metric until that is loaded


@dataclass(kw_only=True)
class ModelOptions:
    """Which model is trained."""

    _argument_group_name = "model"

    model: str | None = option(None, "Directory of a saved model, or its id on the Hub.", metavar="ID_OR_DIR")
    from_scratch: bool = option(False, "Take only the config of --model: weights are random and none are downloaded.")
    model_type: str | None = option(
        None,
        "Instead of --model: an architecture of transformers, such as vit, with its default sizes.",
        metavar="TYPE",
    )
    config_overrides: str | None = option(
        None, "Sizes to change when training from scratch: hidden_size=64,num_hidden_layers=4,...", metavar="K=V,..."
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_type is None):
            raise ValueError("name the model: --model ID_OR_DIR, or --model-type TYPE to train from scratch")
        self.from_scratch = self.from_scratch or self.model_type is not None
        if self.config_overrides and not self.from_scratch:
            raise ValueError("--config-overrides change the sizes of a new model: they need --from-scratch")


@dataclass(kw_only=True)
class KronOptions(LayerOptions):
    """The Kronecker layers of a model and their sparsity."""

    block_size: list[int] | None = option(
        None, "Block of W, one number or two: out in; -1 is the whole dimension. (default: 16)", metavar="N"
    )
    rank: int | None = option(None, "Number of Kronecker terms. (default: 4)", metavar="R")
    init_weights: Literal["random", "nearest"] | None = option(
        None,
        "How the factors start in a trained dense model: nearest keeps little of its weights, random nothing.",
    )
    target_sparsity: float | None = option(None, "Share of zero blocks to end with, in [0, 1).", metavar="F")
    l1: float | None = option(
        None, "Strength of the l1 penalty on S, the paper's mode; not with a target.", metavar="F"
    )
    sparsity_scope: Literal["global", "layer"] | None = option(None, "Rank blocks over all layers, or in each.")
    sparsity_start: float | None = option(None, "Start of the ramp as a share of all steps.", metavar="F")
    sparsity_end: float | None = option(None, "End of the ramp, where masks freeze, as a share.", metavar="F")
    sparsity_interval: int | None = option(None, "Steps between two prunings.", metavar="N")
    sparsity_regrowth: Literal["interval", "straight_through"] | None = option(
        None, "Whether pruned blocks grow back from zero, between prunings, or train on unseen."
    )
    sparsity_group_penalty: float | None = option(
        None, "How much whole rows or columns of blocks count against single blocks, in [0, 1].", metavar="F"
    )
    sparsity_groups: Literal["rows", "columns", "both"] | None = option(None, "Which of them.")
    factor_lr: float = option(4.0, "Factor of the learning rate of A and B.", metavar="F")
    mask_lr: float = option(1.0, "Factor of the learning rate of S.", metavar="F")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_sparsity is not None and self.l1 is not None:
            raise ValueError("--target-sparsity and --l1 exclude each other: the one fixes the sparsity, the other not")

    def conversion(self) -> dict[str, Any]:
        """The arguments for `KronConfig` that were given."""
        start = {} if self.init_weights is None else {"init_weights": self.init_weights}
        return super().conversion() | start

    def sparsity(self) -> dict[str, Any]:
        """The arguments for `SparsityCallback`, but for the target, that were given."""
        given = {
            "scope": self.sparsity_scope,
            "start": self.sparsity_start,
            "end": self.sparsity_end,
            "interval": self.sparsity_interval,
            "regrowth": self.sparsity_regrowth,
            "group_penalty": self.sparsity_group_penalty,
            "groups": self.sparsity_groups,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class CommandArguments(PublishedArguments):
    """`TrainingArguments` with defaults for training Kronecker layers."""

    _argument_group_name = "training: every option of transformers.TrainingArguments"

    output_dir: str | None = option("kron-train", "Where checkpoints and the trained model go.")
    per_device_train_batch_size: int = option(32, "Images a step on each device.")
    per_device_eval_batch_size: int = option(64, "Images a step of an evaluation on each device.")
    learning_rate: float = option(1e-3, "Base learning rate; see --factor-lr.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = option(0.05, "Steps of warm-up, or their share of all steps if below 1.")
    weight_decay: float = option(0.05, "Weight decay; none for S, biases and norms.")
    logging_steps: float = option(10, "Steps between two lines of the log, or their share of all steps if below 1.")
    eval_strategy: IntervalStrategy | str = option(
        "auto", "When to measure on the validation images: no, steps, epoch; auto is whenever a checkpoint is saved."
    )
    save_strategy: SaveStrategy | str = option("epoch", "When to save a checkpoint: no, steps, epoch, best.")
    save_total_limit: int | None = option(2, "Checkpoints to keep; the best is kept besides.")
    load_best_model_at_end: bool = option(
        True, "End with the checkpoint that is best on the validation images, if all checkpoints are measured."
    )
    do_train: bool = option(True, "Train; without it a saved model is only measured.")
    do_predict: bool = option(True, "Measure on the test images at the end.")

    def __post_init__(self) -> None:
        save = SaveStrategy(self.save_strategy)
        if self.eval_strategy == "auto":
            self.eval_strategy = "epoch" if save is SaveStrategy.BEST else save.value
            if self.eval_strategy == "steps" and self.eval_steps is None:
                self.eval_steps = self.save_steps
        strategy = IntervalStrategy(self.eval_strategy)
        if strategy is IntervalStrategy.NO or (save is not SaveStrategy.BEST and save.value != strategy.value):
            self.load_best_model_at_end = False
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = METRIC
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there it only warns
        super().__post_init__()
