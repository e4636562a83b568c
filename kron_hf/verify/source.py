"""Where the files of a saved model are, a folder or the Hub, and the model in them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from kron_hf.checkpoint.reading import clean_errors, read_config
from kron_hf.claims import Claims
from kron_hf.escaping import one_line, shown
from kron_hf.model import model_class_for

__all__ = ["find_directory", "load_model"]

PATTERNS = ("*.safetensors", "*.json", "*.png", "README.md")
NESTED = ("*/*.safetensors", "*/*.png")  # checkpoints that Trainer pushes: as large as the model each


def find_directory(name: str, revision: str | None = None, *, also: Iterable[str] = ()) -> Path:
    """The folder of a saved model; of an id on the Hub the files are downloaded, or found in the cache.

    Args:
        name: Folder, or id on the Hub.
        revision: Branch, tag or commit on the Hub.
        also: Names of files that are wanted besides weights, JSON and the card.

    Raises:
        OSError: There is none.
    """
    if Path(name).is_dir():
        return Path(name)
    # A local path must not become a question to the Hub.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise NotADirectoryError(f"{name} is no directory")
    try:
        wanted = {"allow_patterns": [*PATTERNS, *also], "ignore_patterns": list(NESTED)}
        return Path(snapshot_download(name, revision=revision, **wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = one_line(str(error)).replace(constants.HF_HUB_CACHE, "the cache")
        raise OSError(f"{name} is no directory here, and no model on the Hub could be read: {reason}") from error


def load_model(directory: Path, claims: Claims | None = None, base: str | None = None) -> nn.Module:
    """The model of a folder, through the stock loaders; of an adapter with its base.

    Args:
        directory: The folder.
        claims: They name the class of an adapter's base; None is the class that the adapter names.
        base: The base of an adapter; None is the one that it names.

    Raises:
        OSError: A file is missing.
        ValueError: The files are damaged, hold no Kronecker layers, or an adapter whose base is not known.
    """
    with clean_errors(directory.name):
        if (directory / "adapter_config.json").is_file():
            return _load_adapter(directory, claims, base)
        config: Any = read_config(str(directory))
        method = getattr(config, "quantization_config", None)
        if not isinstance(method, dict) or method.get("quant_method") != "kron":
            raise ValueError("this model has no Kronecker layers (its config.json names none)")
        model_class = model_class_for(config, with_head=False)
        # Where a config names no dtype transformers would read it from the weights, before they are checked.
        return model_class.from_pretrained(directory, dtype=config.dtype or "float32", use_safetensors=True)


def _load_adapter(directory: Path, claims: Claims | None, base: str | None) -> nn.Module:
    import peft
    import transformers

    config = peft.PeftConfig.from_pretrained(str(directory))
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError("adapter_config.json names no base model; pass --base DIR_OR_ID")
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    wanted = mapping.get("base_model_class") if claims is None else claims.model_class
    if wanted is None:  # PEFT does not write it where there is a task type
        base_config: Any = read_config(name)
        model_class = model_class_for(base_config, with_head=False)
    else:
        model_class = getattr(transformers, wanted, None) if isinstance(wanted, str) and wanted.isidentifier() else None
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        source = "adapter_config.json names" if claims is None else "the claims name"
        raise ValueError(f"{source} no model class of transformers: {shown(wanted)}")
    model = model_class.from_pretrained(name, use_safetensors=True)
    return PeftModel.from_pretrained(model, directory)
