"""`kron-hf verify` from a name to the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kron_hf.claims import Claims, FileClaim, read_claims
from kron_hf.command.options import DataOptions
from kron_hf.escaping import one_line
from kron_hf.verify.files import check_files, check_loaded, check_pins, parse_pins
from kron_hf.verify.metrics import check_metrics
from kron_hf.verify.model import check_card, check_counts, check_merge, check_zeros
from kron_hf.verify.report import Check, Report, failed, unchecked
from kron_hf.verify.source import find_directory, load_model

__all__ = ["verify"]


def verify(
    name: str,
    *,
    sha256: Sequence[str] = (),
    data: DataOptions | None = None,
    base: str | None = None,
    revision: str | None = None,
) -> Report:
    """Counts again what the card of a saved model claims.

    Who changes a model and writes a new card for it passes: this is a check of integrity, not of authorship. `sha256`
    pins files to checksums that came another way.

    Args:
        name: Folder of the model, or its id on the Hub.
        sha256: Checksums, each `HEX` of the weight file or `FILE=HEX`.
        data: The data that its metrics were measured on.
        base: The base of an adapter; None is the one that it names.
        revision: Branch, tag or commit on the Hub.

    Raises:
        OSError: There are no claims, or the data cannot be read.
        ValueError: The claims are malformed, or an option is.
    """
    directory = find_directory(name, revision)
    pins = parse_pins(sha256, directory)
    claims = read_claims(directory)
    checks, files = check_files(directory, claims.files)
    checks += [check_loaded(directory, files), *check_pins(directory, pins)]
    try:
        model = load_model(directory, claims, base)
    except (OSError, ValueError) as error:
        return Report((*checks, failed("the model loads", one_line(str(error)))))
    checks.append(Check("the model loads", "", "with the stock loaders", True))
    checks += _check_model(model, directory, claims, files)
    checks += check_metrics(model, directory, claims, data)
    return Report((*checks, *unchecked(_stated(claims), "cannot be told from files")))


def _check_model(model: nn.Module, directory: Path, claims: Claims, files: dict[str, FileClaim]) -> list[Check]:
    try:
        checks, summary, whole = check_counts(model, claims)
    except ValueError as error:
        return [failed("trained parameters", one_line(str(error)))]
    checks += [check_zeros(model), *check_merge(model, claims)]
    return [*checks, *check_card(directory, claims, summary, whole, files)]


def _stated(claims: Claims) -> list[tuple[str, Any]]:
    told = ("base_model", "license", "base_license", "training", "latency", "commit", "versions")
    return [(name.replace("_", " "), "stated") for name in told if claims.stated.get(name)]
