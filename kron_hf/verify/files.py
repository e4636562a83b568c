"""Checksums: whether the files are those that the card was written for, and those that the user pinned."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from kron_hf.bounded_json import read_bounded_json
from kron_hf.claims import CLAIMS_FILE, FileClaim, claimed_files, file_claim
from kron_hf.claims.files import CARD, is_weights
from kron_hf.escaping import shown
from kron_hf.verify.report import Check, compared, failed

__all__ = ["check_files", "check_loaded", "check_pins", "parse_pins"]

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_BYTES = 2**26  # of a config or an index


def check_files(directory: Path, claimed: Mapping[str, FileClaim]) -> tuple[list[Check], dict[str, FileClaim]]:
    """Compares every claimed file, and every file that a loader would read, with its checksum.

    Returns:
        The checks, and what the files are.
    """
    found = {name: file_claim(directory / name) for name in claimed_files(directory)}
    checks: list[Check] = []
    for name in sorted({CARD, *claimed, *found}):
        what = f"SHA-256 of {name}"
        if name not in claimed:
            checks.append(failed(what, "this file is not among the claims"))
        elif name not in found:
            checks.append(failed(what, "this file is missing"))
        else:
            checks.append(compared(what, claimed[name].sha256, found[name].sha256))
    if not any(map(is_weights, found)):
        checks.append(failed("weights", "there is no safetensors file"))
    return checks, found


def check_loaded(directory: Path, found: Mapping[str, FileClaim]) -> Check:
    """Whether `from_pretrained` takes its weights from the files whose checksums were compared, and from no others."""
    what = "weights are loaded from these files"
    known = set(filter(is_weights, found))
    try:
        loaded = _loaded_weights(directory)
    except ValueError as error:
        return failed(what, str(error))
    strays = sorted(loaded - known)
    return Check(what, "", f"{shown(strays[0])} as well" if strays else "and from no others", not strays)


def _loaded_weights(directory: Path) -> set[str]:
    """The names of the weight files in the order in which transformers looks for them."""
    if (directory / "adapter_config.json").is_file():
        return {"adapter_model.safetensors"}
    config = read_bounded_json(directory / CONFIG, MAX_BYTES) if (directory / CONFIG).is_file() else {}
    if isinstance(config, dict) and config.get("transformers_weights") is not None:
        raise ValueError(f"{CONFIG} names other weights: {shown(config['transformers_weights'])}")
    if (directory / WHOLE).is_file() or not (directory / INDEX).is_file():
        return {WHOLE}
    index = read_bounded_json(directory / INDEX, MAX_BYTES)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{INDEX} must hold an object with an object weight_map of names")
    return set(shards.values())


def parse_pins(pins: Iterable[str], directory: Path) -> dict[str, str]:
    """Checksums by file name, of `HEX` or `FILE=HEX`; without a name it is that of the one weight file.

    Raises:
        ValueError: A checksum is malformed, or there is not exactly one weight file.
    """
    parsed: dict[str, str] = {}
    weights = [name for name in claimed_files(directory) if is_weights(name)]
    for pin in pins:
        name, _, digits = pin.rpartition("=")
        if not re.fullmatch("[0-9a-fA-F]{64}", digits):
            raise ValueError(f"--sha256 takes 64 hex digits, or FILE=HEX, got {pin!r}")
        if not name and len(weights) != 1:
            raise ValueError(f"--sha256: there are {len(weights)} weight files; name one, as FILE=HEX")
        parsed[name or weights[0]] = digits.lower()
    return parsed


def check_pins(directory: Path, pins: Mapping[str, str]) -> list[Check]:
    """Compares files with the checksums that the user got from elsewhere."""
    known = {*claimed_files(directory), CLAIMS_FILE}
    checks: list[Check] = []
    for name, digits in pins.items():
        what = f"--sha256 of {name}"
        if name not in known or not (directory / name).is_file():
            checks.append(failed(what, "there is no such file of the checkpoint"))
        else:
            checks.append(compared(what, digits, file_claim(directory / name).sha256))
    return checks
