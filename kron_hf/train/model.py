"""Builds the model of `kron-hf train` and its image processor."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils.import_utils import is_torchvision_available

from kron_hf.checkpoint.reading import clean_errors, read_config
from kron_hf.config import KronConfig
from kron_hf.data.examples import check_channels
from kron_hf.escaping import one_line
from kron_hf.model import get_kron_model
from kron_hf.sparsity.pruning import kron_layers
from kron_hf.train.arguments import KronOptions, ModelOptions

__all__ = ["build_image_processor", "build_model", "model_channels"]

HEADS = "ForImageClassification"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def build_model(
    options: ModelOptions, kron: KronOptions, label_names: list[str], *, token: str | None = None
) -> PreTrainedModel:
    """The model with Kronecker layers and a head for these classes.

    From scratch it is built from a config alone. A dense checkpoint is converted, for which `--init-weights` must say
    how; one with Kronecker layers goes on with those it has.

    Raises:
        OSError: The model cannot be found or read.
        ValueError: Options do not fit the model, or its head the classes.
    """
    config = _config(options, token)
    model_channels(config)
    kronecker = _quant_method(config) == "kron"
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
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
    if not options.ignore_mismatched_sizes:
        _check_head(options, config, label_names)
    with clean_errors(str(options.model)):
        model = AutoModelForImageClassification.from_pretrained(
            str(options.model),
            revision=options.model_revision or "main",
            token=token,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            dtype=torch.float32,  # optimizers need it; --bf16 and --fp16 cast where they may
            use_safetensors=True,
            **labels,
        )
    return model if kron_layers(model) else get_kron_model(model, KronConfig(**kron.conversion()))


def model_channels(config: Any) -> int:
    """Channels of the images that the model takes: grey 1, colour 3.

    Raises:
        ValueError: Images cannot be converted to that many.
    """
    channels = getattr(config, "num_channels", 3)
    check_channels(channels)
    return channels


def build_image_processor(options: ModelOptions, config: Any, *, token: str | None = None) -> Any:
    """The image processor that was asked for or came with the checkpoint, else one made for the config.

    Raises:
        OSError: The one that was asked for cannot be read.
    """
    if options.image_processor is not None:
        return AutoImageProcessor.from_pretrained(options.image_processor, token=token)
    if not options.from_scratch and options.model is not None:
        revision = options.model_revision or "main"
        if _has_image_processor(options.model, revision, token):
            return AutoImageProcessor.from_pretrained(options.model, revision=revision, token=token)
    return _processor_for(config)


def _has_image_processor(name: str, revision: str, token: str | None) -> bool:
    """Whether the checkpoint carries one; a Hub that does not answer is no "no"."""
    if Path(name).is_dir():
        return any(Path(name, file).is_file() for file in PROCESSOR_FILES)
    for file in PROCESSOR_FILES:
        known = try_to_load_from_cache(name, file, revision=revision)
        if known is not None and not isinstance(known, str):
            continue  # the cache remembers that there is none
        try:
            hf_hub_download(name, file, revision=revision, token=token)
        except LocalEntryNotFoundError as error:
            reason = one_line(str(error))
            raise OSError(f"{name}: whether it has a {file} could not be found out: {reason}") from error
        except EntryNotFoundError:
            continue
        return True
    return False


def _processor_for(config: Any) -> Any:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    grey = [0.5] * model_channels(config)
    if is_torchvision_available():
        from transformers import ViTImageProcessor as Processor
    else:
        from transformers import ViTImageProcessorPil as Processor
    return Processor(size={"height": height, "width": width}, image_mean=grey, image_std=grey)


def _config(options: ModelOptions, token: str | None) -> Any:
    if options.model_type is not None:
        try:
            return AutoConfig.for_model(options.model_type)
        except ValueError as error:
            raise ValueError(
                f"--model-type {options.model_type!r} is no architecture of transformers; try vit, deit, swin, dinov2"
            ) from error
    name = str(options.model)
    # A local path must not become a question to the Hub.
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise NotADirectoryError(f"--model {name}: there is no such directory")
    try:
        return read_config(name, revision=options.model_revision or "main", token=token)
    except OSError as error:
        reason = one_line(str(error))
        raise OSError(f"--model {name} is no saved model here, nor could the Hub give it: {reason}") from error


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


def _check_head(options: ModelOptions, config: Any, label_names: list[str]) -> None:
    """A checkpoint with a trained head must have one for these classes, in this order."""
    if not (config.architectures or [""])[0].endswith(HEADS):
        return
    if config.num_labels != len(label_names):
        raise ValueError(
            f"{options.model} has a head for {config.num_labels} classes, the data set has {len(label_names)}; pass "
            "--ignore-mismatched-sizes to replace the head by a new one"
        )
    names = [config.id2label[index] for index in range(config.num_labels)]
    if names != label_names and sorted(names) == sorted(label_names):
        raise ValueError(f"{options.model} and the data set have the same classes in another order: its head would lie")


def _quant_method(config: Any) -> str | None:
    method = getattr(config, "quantization_config", None) or {}
    return method.get("quant_method") if isinstance(method, dict) else method.quant_method
