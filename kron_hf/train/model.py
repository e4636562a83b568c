"""Builds the model of `kron-hf train` and its image processor."""

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from kron_hf.command.checkpoint import check_head, label_maps, load_classifier, load_config, quant_method
from kron_hf.command.options import CheckpointOptions
from kron_hf.command.processor import load_image_processor, make_image_processor, model_channels
from kron_hf.config import KronConfig
from kron_hf.escaping import one_line
from kron_hf.model import get_kron_model
from kron_hf.sparsity.pruning import kron_layers
from kron_hf.train.arguments import KronOptions, ModelOptions

__all__ = ["build_image_processor", "build_model"]


def build_model(
    options: ModelOptions,
    checkpoint: CheckpointOptions,
    kron: KronOptions,
    label_names: list[str],
    *,
    token: str | None = None,
) -> PreTrainedModel:
    """The model with Kronecker layers and a head for these classes.

    From scratch it is built from a config alone. A dense checkpoint is converted, for which `--init-weights` must say
    how; one with Kronecker layers goes on with those it has.

    Raises:
        OSError: The model cannot be found or read.
        ValueError: Options do not fit the model, or its head the classes.
    """
    config = _config(options, checkpoint.model_revision, token)
    model_channels(config)
    kronecker = quant_method(config) == "kron"
    labels = label_maps(label_names)
    if options.from_scratch:
        if kronecker:
            raise ValueError(f"--from-scratch needs the config of a dense model; {options.model} has Kronecker layers")
        return get_kron_model(_from_config(options, config, labels), KronConfig(**kron.conversion()))
    if kronecker and kron.conversion():
        given = ", ".join(f"--{name.replace('_', '-')}" for name in kron.conversion())
        raise ValueError(f"{options.model} has Kronecker layers already, and goes on with those: leave out {given}")
    if not kronecker and kron.init_weights is None:
        raise ValueError(
            f"{options.model} is a dense model with trained weights, and replacing them is a choice; pass one of\n"
            "  --init-weights nearest   the closest fit to each weight, to be trained further\n"
            "  --init-weights random    new weights for the replaced modules\n"
            "  --from-scratch           a new model from its config alone"
        )
    if not checkpoint.ignore_mismatched_sizes:
        check_head(str(options.model), config, label_names)
    model = load_classifier(str(options.model), label_names, checkpoint, token=token)
    return model if kron_layers(model) else get_kron_model(model, KronConfig(**kron.conversion()))


def build_image_processor(
    options: ModelOptions, checkpoint: CheckpointOptions, config: Any, *, token: str | None = None
) -> Any:
    """The image processor that was asked for or came with the checkpoint, else one made for the config.

    Raises:
        OSError: The one that was asked for cannot be read.
    """
    if checkpoint.image_processor is not None:
        return AutoImageProcessor.from_pretrained(checkpoint.image_processor, token=token)
    found = None
    if not options.from_scratch and options.model is not None:
        found = load_image_processor(options.model, checkpoint.model_revision, token=token)
    return make_image_processor(config) if found is None else found


def _config(options: ModelOptions, revision: str | None, token: str | None) -> Any:
    if options.model_type is not None:
        try:
            return AutoConfig.for_model(options.model_type)
        except ValueError as error:
            raise ValueError(
                f"--model-type {options.model_type!r} is no architecture of transformers; try vit, deit, swin, dinov2"
            ) from error
    return load_config(str(options.model), revision, token=token)


def _from_config(options: ModelOptions, config: Any, labels: dict[str, Any]) -> PreTrainedModel:
    if options.config_overrides:
        try:
            config.update_from_string(options.config_overrides)
        except ValueError as error:
            raise ValueError(
                f"--config-overrides {options.config_overrides!r} must be key=value,... with keys of a "
                f"{type(config).__name__}: {error}"
            ) from error
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    try:
        return AutoModelForImageClassification.from_config(config)
    except ValueError as error:
        reason = one_line(str(error).partition("\n")[0])
        raise ValueError(f"no image classifier can be built from a {type(config).__name__}: {reason}") from error
