"""Checksums of files in a Hugging Face cache.

A download over plain HTTP is checked for its length only, so a damaged one would load without a word. The cache knows
better: a snapshot's file is a link to `blobs/<checksum>`, the SHA-256 of a large file or git's SHA-1 of a small one.
"""

import hashlib
import re
from pathlib import Path

__all__ = ["check_cached_files"]

CHUNK = 2**22


def check_cached_files(files: list[str]) -> None:
    """Compares weight files, their index and their config with the checksums that the cache files them under.

    Files elsewhere, and a cache without links (as on Windows), carry no checksum and are left alone.

    Raises:
        ValueError: The contents of a file are not what was to be downloaded.
    """
    paths = {Path(file) for file in files}
    for folder in {path.parent for path in paths}:
        paths |= {folder / "config.json", folder / "model.safetensors.index.json"}
    for path in sorted(paths):
        expected = _expected_checksum(path)
        if expected is not None and _checksum(path, len(expected)) != expected:
            raise ValueError(
                f"{path.name}: the cached file is damaged, its checksum is not {expected}; download it again: "
                "from_pretrained(..., force_download=True)"
            )


def _expected_checksum(path: Path) -> str | None:
    # Only the first link is read: a blob may itself be a link into a store that uses names of another kind.
    target = path.readlink() if path.is_symlink() and path.exists() else path
    named = target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", target.name)
    return target.name if named else None


def _checksum(path: Path, length: int) -> str:
    digest = hashlib.sha256()
    if length == 40:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
