"""The file `kron_claims.json` beside a card.

It stands beside the card and not in its YAML: the Hub's editor, `metadata_update` and Trainer rewrite that, and a list
of layers would bury the metadata that people read. The card's figures are written from the claims, and `kron-hf verify`
compares both.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kron_hf.bounded_json import read_bounded_json
from kron_hf.claims.files import FileClaim
from kron_hf.escaping import shown

__all__ = ["CLAIMS_FILE", "Claims", "MetricClaim", "is_finite_number", "read_claims", "write_claims"]

CLAIMS_FILE = "kron_claims.json"
FORMAT_VERSION = 1
MAX_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class MetricClaim:
    """One figure that was measured.

    Attributes:
        metric: Its name, such as `accuracy`.
        value: What was measured.
        dataset: Name of the data.
        split: `test` or `validation`; empty if that was not said.
    """

    metric: str
    value: float
    dataset: str
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a card claims.

    Attributes:
        kron_hf: Version that wrote the card.
        model_class: Class of the model; for an adapter that of its base.
        whole: Figures of the whole model, by name.
        layers: Those of each Kronecker layer.
        frozen: Parameters that were not trained; all others count as trained.
        merges: Whether merged dense layers gave the same outputs, to 1e-9, when the card was written.
        files: Size and checksum by file name.
        metrics: What was measured on data.
        stated: What nobody can recompute from the files: training, latency, licence.
    """

    kron_hf: str
    model_class: str
    whole: dict[str, Any]
    layers: list[dict[str, Any]]
    frozen: list[str] = field(default_factory=list)
    merges: bool = True
    files: dict[str, FileClaim] = field(default_factory=dict)
    metrics: list[MetricClaim] = field(default_factory=list)
    stated: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["files"] = {name: {"bytes": claim.bytes, "sha256": claim.sha256} for name, claim in self.files.items()}
        values["metrics"] = [asdict(metric) for metric in self.metrics]
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Any) -> "Claims":
        """Of what `to_dict` gave.

        Raises:
            ValueError: It is malformed, or of a newer version.
        """
        _check_object(values)
        given = {key: value for key, value in values.items() if key != "format_version"}
        files = {name: _file(name, claim) for name, claim in given["files"].items()}
        return cls(**given | {"files": files, "metrics": [_metric(metric) for metric in given["metrics"]]})


def write_claims(claims: Claims, directory: Path) -> None:
    """Writes the file, whole or not at all."""
    partial = directory / f"_{CLAIMS_FILE}.partial"
    partial.write_text(json.dumps(claims.to_dict(), indent=1) + "\n", encoding="utf-8")
    partial.replace(directory / CLAIMS_FILE)


def read_claims(directory: Path) -> Claims:
    """Reads the file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is malformed, or of a newer version.
    """
    path = directory / CLAIMS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {CLAIMS_FILE}: the card of this model makes no claims that can be checked"
        )
    return Claims.from_dict(read_bounded_json(path, MAX_BYTES))


def is_finite_number(value: Any) -> bool:
    """Whether it is a number that is one as a float, too; a file may hold integers that are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_object(values: Any) -> None:
    kinds = {
        "format_version": int,
        **{"kron_hf": str, "model_class": str, "whole": dict, "layers": list, "frozen": list},
        **{"merges": bool, "files": dict, "metrics": list, "stated": dict},
    }
    if not isinstance(values, dict):
        raise ValueError(f"{CLAIMS_FILE} must hold a JSON object, got {shown(values)}")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{CLAIMS_FILE} has version {shown(version)}, this kron_hf reads up to {FORMAT_VERSION}")
    if values.keys() != kinds.keys():
        raise ValueError(f"{CLAIMS_FILE} must have the keys {sorted(kinds)}, got {shown(sorted(values))}")
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{CLAIMS_FILE}: {name} must be of type {kind.__name__}, got {shown(values[name])}")
    for name, kind in (("layers", dict), ("frozen", str), ("metrics", dict)):
        if not all(isinstance(entry, kind) for entry in values[name]):
            raise ValueError(f"{CLAIMS_FILE}: {name} must be a list of {kind.__name__}")


def _file(name: str, claim: Any) -> FileClaim:
    is_plain = isinstance(claim, Mapping) and claim.keys() == {"bytes", "sha256"}
    if not is_plain or not isinstance(claim["bytes"], int) or not isinstance(claim["sha256"], str):
        raise ValueError(f"{CLAIMS_FILE}: file {shown(name)} needs bytes and sha256, got {shown(claim)}")
    if not re.fullmatch("[0-9a-f]{64}", claim["sha256"]):
        raise ValueError(f"{CLAIMS_FILE}: sha256 of {shown(name)} must be 64 hex digits, got {shown(claim['sha256'])}")
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{CLAIMS_FILE}: {shown(name)} is no name of a file in this folder")
    return FileClaim(claim["bytes"], claim["sha256"])


def _metric(values: dict[str, Any]) -> MetricClaim:
    value = values.get("value")
    texts = [values.get(key) for key in ("metric", "dataset", "split")]
    if (
        values.keys() != {"metric", "value", "dataset", "split"}
        or not is_finite_number(value)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise ValueError(f"{CLAIMS_FILE}: a metric needs metric, value, dataset and split, got {shown(values)}")
    return MetricClaim(**values)
