"""The groups of options that several commands have."""

# ruff: noqa: RUF009  # option returns a dataclasses.field, which no instance shares
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

__all__ = [
    "CheckpointOptions",
    "DataOptions",
    "LayerOptions",
    "PublishedArguments",
    "RunOptions",
    "option",
    "required",
]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a group that `HfArgumentParser` makes an option of."""
    return field(default=default, metadata={"help": help, **metadata})


def required(help: str, **metadata: Any) -> Any:
    """A field that must be given."""
    return field(metadata={"help": help, **metadata})


@dataclass(kw_only=True)
class CheckpointOptions:
    """How the model that a command names is read."""

    _argument_group_name = "checkpoint"

    model_revision: str | None = option(None, "Branch, tag or commit of --model on the Hub.", metavar="REV")
    image_processor: str | None = option(
        None, "Directory or id of an image processor; else that of --model, else one made for its config.", metavar="ID"
    )
    ignore_mismatched_sizes: bool = option(False, "Put a new head in the place of one for other classes.")


@dataclass(kw_only=True)
class LayerOptions:
    """Which modules become Kronecker layers, and of which size."""

    _argument_group_name = "Kronecker layers"

    block_size: list[int] | None = option(
        None, "Block of W for all layers, one number or two: out in; -1 is the whole dimension.", metavar="N"
    )
    rank: int | None = option(None, "Number of Kronecker terms.", metavar="R")
    target_modules: list[str] | None = option(
        None, "Modules to replace, by name or name ending, or all-linear. (default: attention and MLP)", metavar="NAME"
    )
    exclude_modules: list[str] | None = option(None, "Modules to leave alone.", metavar="NAME")

    def __post_init__(self) -> None:
        if self.block_size is not None and len(self.block_size) not in (1, 2):
            raise ValueError(f"--block-size takes one number or two (out, in), got {self.block_size}")

    def conversion(self) -> dict[str, Any]:
        """The arguments for `KronConfig` that were given."""
        sizes, names = self.block_size, self.target_modules
        given = {
            "block_size": sizes and (sizes[0] if len(sizes) == 1 else tuple(sizes)),
            "rank": self.rank,
            "target_modules": "all-linear" if names == ["all-linear"] else names,
            "exclude_modules": self.exclude_modules,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class DataOptions:
    """Which images a model is trained on."""

    _argument_group_name = "data"

    dataset: str = required(
        "Id on the Hub; folder of images (train/CLASS/*.png, or CLASS/*.png); folder of IDX files; "
        "digits or fashion_mnist.",
        metavar="ID_OR_DIR",
    )
    dataset_config: str | None = option(None, "Configuration of the data set on the Hub.", metavar="NAME")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the data set.", metavar="REV")
    image_column: str | None = option(None, "Column of the images; found by itself.", metavar="NAME")
    label_column: str | None = option(None, "Column of the labels; found by itself.", metavar="NAME")
    train_split: str = option("train", "Split to train on.", metavar="NAME")
    validation_split: str | None = option(
        None, "Split for every choice; if there is none, a part of the training split is held out.", metavar="NAME"
    )
    test_split: str = option("test", "Split for the final figures alone.", metavar="NAME")
    validation_fraction: float = option(0.1, "Share of the training images to hold out.", metavar="F")
    horizontal_flip: bool = option(False, "Mirror half of the training images.")
    metric: str | None = option(
        None, "Metric for evaluate.load; accuracy comes with kron_hf and needs no network.", metavar="ID_OR_DIR"
    )
    metric_options: str | None = option(None, "What to pass to that metric: average=macro,...", metavar="K=V,...")


@dataclass(kw_only=True)
class RunOptions:
    """What becomes of an earlier run."""

    _argument_group_name = "run"

    overwrite: bool = option(
        False, "Start anew in an --output-dir of an earlier run of this command; without it a killed run goes on."
    )


@dataclass
class PublishedArguments(TrainingArguments):
    """`TrainingArguments` that pickle without what is nobody else's business."""

    def __getstate__(self) -> dict[str, Any]:
        """Trainer pickles its arguments beside each model, and pushes them: without the token and local paths."""
        local = {"output_dir": Path(self.output_dir or "").name, "resume_from_checkpoint": None}
        return {**vars(self), "hub_token": None, **local}
