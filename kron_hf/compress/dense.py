"""The trained model that is compressed, with a head for the classes of the data."""

from typing import Any

from transformers import AutoImageProcessor, PreTrainedModel

from kron_hf.command.checkpoint import check_head, has_head, load_classifier, load_config, quant_method
from kron_hf.command.options import CheckpointOptions
from kron_hf.command.processor import load_image_processor, make_image_processor, model_channels

__all__ = ["check_dense", "load_dense", "load_processor", "needs_head"]


def check_dense(model: str, options: CheckpointOptions, label_names: list[str], *, token: str | None) -> Any:
    """The config of a model that can be compressed for these classes.

    Raises:
        OSError: It cannot be found or read.
        ValueError: It is converted or quantized already, takes other images, or its head has other classes.
    """
    config = load_config(model, options.model_revision, token=token)
    method = quant_method(config)
    if method is not None:
        what = "has Kronecker layers already" if method == "kron" else f"is quantized ({method})"
        raise ValueError(f"{model} {what}; kron-hf compress starts from a dense model")
    model_channels(config)
    if not options.ignore_mismatched_sizes:
        check_head(model, config, label_names)
    return config


def needs_head(options: CheckpointOptions, config: Any) -> bool:
    """Whether a head has to be fitted."""
    return options.ignore_mismatched_sizes or not has_head(config)


def load_dense(model: str, options: CheckpointOptions, label_names: list[str], *, token: str | None) -> PreTrainedModel:
    """The classifier, in evaluation mode; its head is random if it `needs_head`.

    Raises:
        OSError: It cannot be found or read.
        ValueError: It is damaged, or no image classifier.
    """
    return load_classifier(model, label_names, options, token=token).eval()


def load_processor(
    model: str, options: CheckpointOptions, config: Any, *, image_size: int | None = None, token: str | None
) -> Any:
    """The image processor that was asked for or came with the checkpoint, else one made for the config.

    Raises:
        OSError: The one that was asked for cannot be read.
    """
    if options.image_processor is not None:
        found = AutoImageProcessor.from_pretrained(options.image_processor, token=token)
    else:
        found = load_image_processor(model, options.model_revision, token=token)
    if found is None or image_size is not None:
        return make_image_processor(config, size=image_size, like=found)
    return found
