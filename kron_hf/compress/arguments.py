"""The options of `kron-hf compress`, but for those that it shares with other commands."""

# option returns a dataclasses.field, which no instance shares
from dataclasses import dataclass
from typing import Any, Literal

from kron_hf.command.options import LayerOptions, option, required

__all__ = ["ComparisonOptions", "CompressionOptions", "DenseOptions", "HealingOptions"]

BUDGETS = ("target_params", "target_flops", "max_error")
DEFAULT_BUDGET = 0.25  # of the parameters


@dataclass(kw_only=True)
class DenseOptions:
    """The model to compress."""

    _argument_group_name = "model"

    model: str = required(
        "Directory of a trained model, or its id on the Hub: an image classifier for these classes, or a backbone, "
        "to which a head is fitted first.",
        metavar="ID_OR_DIR",
    )
    image_size: int | None = option(
        None, "Pixels a side, for a model that takes other images than its own, as DINOv2 does.", metavar="N"
    )
    head_images: int = option(10_000, "Training images that a new head is fitted to.", metavar="N")

    def __post_init__(self) -> None:
        for name in ("image_size", "head_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


@dataclass(kw_only=True)
class CompressionOptions:
    """How small it becomes, by one budget, or else one block size and rank."""

    _argument_group_name = "compression"

    target_params: float | None = option(
        None, "Share of the layers' parameters to keep; data chooses shape and rank of each. (default: 0.25)"
    )
    target_flops: float | None = option(None, "The same for their FLOPs.", metavar="F")
    max_error: float | None = option(None, "As few parameters as this relative error of each layer takes.", metavar="F")
    calibration_images: int = option(2000, "Training images that the layers are fitted to.", metavar="N")
    readout: Literal["cls", "all"] | None = option(None, "Which tokens count; by default those that the head reads.")

    def __post_init__(self) -> None:
        if self.calibration_images < 1:
            raise ValueError(f"--calibration-images must be at least 1, got {self.calibration_images}")

    def conversion(self, layers: LayerOptions) -> dict[str, Any]:
        """The arguments for `KronConfig` that were given.

        Raises:
            ValueError: They exclude each other.
        """
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        sizes = [name for name in ("block_size", "rank") if getattr(layers, name) is not None]
        if len(given) + bool(sizes) > 1:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in (*given, *sizes))
            raise ValueError(f"{flags}: give one budget, or --block-size and --rank, since each alone decides")
        if len(sizes) == 1:
            raise ValueError("--block-size and --rank belong together")
        return layers.conversion() | (given or ({} if sizes else {"target_params": DEFAULT_BUDGET}))


@dataclass(kw_only=True)
class ComparisonOptions:
    """What the two models are compared on, besides the images of the task."""

    _argument_group_name = "comparison"

    ood_dataset: str | None = option(
        None,
        "Images of another kind, labelled or not, as --dataset names them: how far from the dense model is the "
        "compressed one there, and on those of the task?",
        metavar="ID_OR_DIR",
    )
    ood_images: int = option(1000, "How many of either.", metavar="N")

    def __post_init__(self) -> None:
        if self.ood_images < 1:
            raise ValueError(f"--ood-images must be at least 1, got {self.ood_images}")


@dataclass(kw_only=True)
class HealingOptions:
    """The training afterwards, and where the result goes."""

    _argument_group_name = "training"

    output_dir: str = option("kron-compress", "Where the model and the report go.", metavar="DIR")
    distill_steps: int = option(500, "Steps of distillation from the dense model; 0 is none.", metavar="N")
    finetune_steps: int = option(500, "Steps on the labels after that; 0 is none.", metavar="N")
    learning_rate: float = option(1e-5, "Of the distillation; from 3e-5 on it loses what was fitted.", metavar="F")
    finetune_learning_rate: float = option(1e-5, "Of the steps on the labels.", metavar="F")
    finetune_logits: float | None = option(
        None,
        "Weight of the dense model's logits beside the labels. (default: 1, but 0 where its head was fitted here)",
        metavar="F",
    )
    batch_size: int = option(32, "Images a step.", metavar="N")
    save_steps: int = option(100, "Steps between two checkpoints, from which a killed run goes on.", metavar="N")
    logging_steps: int = option(50, "Steps between two lines of the log.", metavar="N")
    dataloader_num_workers: int = option(0, "Processes that read images.", metavar="N")
    seed: int = option(0, "Of the order of the images and of what is drawn from them.", metavar="N")
    bf16: bool = option(False, "Train in bfloat16 where that is safe.")
    fp16: bool = option(False, "Train in float16 where that is safe.")
    use_cpu: bool = option(False, "Leave a GPU alone.")
    disable_tqdm: bool = option(False, "Show no progress bars of the training.")
    push_to_hub: bool = option(False, "Upload the result.")
    hub_model_id: str | None = option(None, "Repository for it; else named as --output-dir.", metavar="ID")
    hub_private_repo: bool | None = option(None, "Whether a new repository is private.")
    hub_token: str | None = option(None, "Token for the Hub; else the one logged in with.", metavar="TOKEN")

    def __post_init__(self) -> None:
        for name, least in (("distill_steps", 0), ("finetune_steps", 0), ("batch_size", 1), ("save_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
