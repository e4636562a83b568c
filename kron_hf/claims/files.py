"""Size and SHA-256 of the files that a card speaks of."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["CARD", "FileClaim", "claimed_files", "file_claim", "is_weights", "weight_files"]

CARD = "README.md"
CHUNK = 2**22
WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?|adapter_model)\.safetensors")
# What from_pretrained reads besides, and what the card shows.
OTHERS = (
    *("config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("preprocessor_config.json", "processor_config.json", CARD, "kron_masks.png", "kron_training.png"),
)


class FileClaim(NamedTuple):
    """A file as it was when its card was written."""

    bytes: int
    sha256: str


def claimed_files(directory: Path) -> list[str]:
    """The names of the files in a directory that claims are made about, sorted."""
    return sorted(path.name for path in directory.iterdir() if path.is_file() and _is_claimed(path.name))


def weight_files(directory: Path) -> list[str]:
    """The names of the weight files in a directory, sorted."""
    return [name for name in claimed_files(directory) if is_weights(name)]


def is_weights(name: str) -> bool:
    """Whether a loader takes the file for weights."""
    return WEIGHTS.fullmatch(name) is not None


def file_claim(path: Path) -> FileClaim:
    """Reads a file once."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileClaim(size, digest.hexdigest())


def _is_claimed(name: str) -> bool:
    return name in OTHERS or is_weights(name)
