"""Reads the checkpoint that a command starts from."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from kron_hf.checkpoint.reading import clean_errors, read_config
from kron_hf.command.options import CheckpointOptions
from kron_hf.escaping import one_line

__all__ = ["check_head", "has_head", "label_maps", "load_classifier", "load_config", "quant_method"]

HEADS = "ForImageClassification"


def load_config(name: str, revision: str | None = None, *, token: str | None = None) -> Any:
    """The config of a saved model.

    Raises:
        OSError: It cannot be found or read.
    """
    # A local path must not become a question to the Hub.
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise NotADirectoryError(f"--model {name}: there is no such directory")
    try:
        return read_config(name, revision=revision or "main", token=token)
    except OSError as error:
        reason = one_line(str(error))
        raise OSError(f"--model {name} is no saved model here, nor could the Hub give it: {reason}") from error


def load_classifier(
    name: str, label_names: list[str], options: CheckpointOptions, *, token: str | None = None
) -> PreTrainedModel:
    """The image classifier of a checkpoint, in float32; a checkpoint without a head gets one with random weights.

    Raises:
        OSError: It cannot be found or read.
        ValueError: It is damaged, or no image classifier.
    """
    with clean_errors(name):
        return AutoModelForImageClassification.from_pretrained(
            name,
            revision=options.model_revision or "main",
            token=token,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            dtype=torch.float32,  # optimizers need it; --bf16 and --fp16 cast where they may
            use_safetensors=True,
            **label_maps(label_names),
        )


def label_maps(label_names: list[str]) -> dict[str, Any]:
    """`id2label` and `label2id` of a config."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def has_head(config: Any) -> bool:
    """Whether the checkpoint is that of an image classifier."""
    return (config.architectures or [""])[0].endswith(HEADS)


def check_head(name: str, config: Any, label_names: list[str]) -> None:
    """A checkpoint with a trained head must have one for these classes, in this order.

    Raises:
        ValueError: It has another.
    """
    if not has_head(config):
        return
    if config.num_labels != len(label_names):
        raise ValueError(
            f"{name} has a head for {config.num_labels} classes, the data set has {len(label_names)}; pass "
            "--ignore-mismatched-sizes to replace the head by a new one"
        )
    names = [config.id2label[index] for index in range(config.num_labels)]
    if names != label_names and sorted(names) == sorted(label_names):
        raise ValueError(f"{name} and the data set have the same classes in another order: its head would lie")


def quant_method(config: Any) -> str | None:
    """What the checkpoint says that its layers are, "kron" for ours; None if they are plain."""
    method = getattr(config, "quantization_config", None) or {}
    return method.get("quant_method") if isinstance(method, dict) else method.quant_method
