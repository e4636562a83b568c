"""The directory of an export: it appears whole or not at all, and takes the place of nothing but another export."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kron_hf.bounded_json import read_bounded_json
from kron_hf.deploy.report import ExportReport
from kron_hf.escaping import shown
from kron_hf.trainer.whole_files import publish_directory, saving_errors, unfinished

__all__ = ["RECORD", "check_target", "whole_directory", "write_record"]

RECORD, WRITTEN = "kron_export.json", "written"
MAX_BYTES = 2**24


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Refuses to write over anything but an earlier export, and over that unless it may be lost.

    Raises:
        FileExistsError: The directory is a file, or holds something.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"the output directory {directory} is a file")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not (directory / RECORD).is_file():
        raise FileExistsError(
            f"the output directory {directory} is not empty and was not written by an export; name another one"
        )
    if strays := sorted(_names(directory) - _written(directory)):
        raise FileExistsError(
            f"the output directory {directory} holds {shown(strays[0])}, which no export wrote; name another one"
        )
    if not overwrite:
        raise FileExistsError(
            f"the output directory {directory} holds an export; overwrite=True (--overwrite) replaces it"
        )


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Gives a new directory to write into, which in the end takes the name of the other; after an error it is removed.

    Raises:
        OSError: Something cannot be written.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = unfinished(directory)
    shutil.rmtree(staging, ignore_errors=True)  # a killed export left it
    staging.mkdir()
    try:
        with saving_errors(staging, directory):
            yield staging
            publish_directory(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_record(folder: Path, report: ExportReport) -> None:
    """Writes the figures beside the files, by which the next export knows the directory for one of ours."""
    record = {**report.to_dict(), WRITTEN: sorted(_names(folder))}
    (folder / RECORD).write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")


def _names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def _written(directory: Path) -> set[str]:
    """What the export wrote that made a directory; nothing if its record is none of ours."""
    try:
        record = read_bounded_json(directory / RECORD, MAX_BYTES)
    except ValueError:
        return set()
    written = record.get(WRITTEN) if isinstance(record, dict) else None
    return {RECORD, *(name for name in written if isinstance(name, str))} if isinstance(written, list) else set()
