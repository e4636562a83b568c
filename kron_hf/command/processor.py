"""The image processor that goes with a model."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoImageProcessor
from transformers.utils.import_utils import is_torchvision_available

from kron_hf.data.examples import check_channels
from kron_hf.escaping import one_line

__all__ = ["load_image_processor", "make_image_processor", "model_channels"]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def model_channels(config: Any) -> int:
    """Channels of the images that the model takes: grey 1, colour 3.

    Raises:
        ValueError: Images cannot be converted to that many.
    """
    channels = getattr(config, "num_channels", 3)
    check_channels(channels)
    return channels


def load_image_processor(name: str, revision: str | None = None, *, token: str | None = None) -> Any:
    """The image processor that came with a checkpoint; None if there is none.

    Raises:
        OSError: It cannot be read, or the Hub does not tell.
    """
    revision = revision or "main"
    if not _has_image_processor(name, revision, token):
        return None
    return AutoImageProcessor.from_pretrained(name, revision=revision, token=token)


def make_image_processor(config: Any, *, size: int | None = None, like: Any = None) -> Any:
    """One that resizes, as a model with this config takes images.

    Args:
        config: The model's.
        size: Pixels a side; None is the model's own.
        like: A processor of which to take mean and standard deviation of the pixels; None is .5 for both.
    """
    own: Any = size or getattr(config, "image_size", 224)
    height, width = (own, own) if isinstance(own, int) else (own[0], own[-1])
    grey = [0.5] * model_channels(config)
    mean, std = (getattr(like, name, None) or grey for name in ("image_mean", "image_std"))
    if is_torchvision_available():
        from transformers import ViTImageProcessor as Processor
    else:
        from transformers import ViTImageProcessorPil as Processor
    return Processor(size={"height": height, "width": width}, image_mean=mean, image_std=std)


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
