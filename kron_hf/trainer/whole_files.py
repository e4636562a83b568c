"""Directories that appear whole or not at all, whenever the process is killed.

A directory is written under a name that begins with an underscore, which neither Trainer takes for a checkpoint nor
`upload_folder` of Trainer sends to the Hub; when it is complete and on the disk it is renamed.
"""

import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kron_hf.escaping import one_line

__all__ = ["discard", "publish_directory", "publish_model", "remove_leftovers", "saving_errors", "unfinished"]

UNFINISHED, DISCARDED, REPLACED = "_unfinished-", "_discarded-", "_replaced-"
# Without one of these no loader takes a directory for a model: they go first and come last.
MODEL_CONFIGS = ("config.json", "adapter_config.json")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
KEPT = "training_args.bin"  # differs from run to run, and no loader reads it


def unfinished(directory: Path) -> Path:
    """The name beside `directory` under which it is written."""
    return directory.with_name(UNFINISHED + directory.name)


def publish_directory(staging: Path, final: Path) -> None:
    """Renames `staging`, once it is on the disk, to `final`, in the place of what stood there before.

    A kill between the two renames leaves that under a name from which `remove_leftovers` brings it back.
    """
    _sync_tree(staging)
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    staging.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def publish_model(staging: Path, target: Path) -> None:
    """Moves the files of a saved model from `staging` into `target`, over those of another model.

    A kill on the way leaves the old model, the new one, or a directory without `config.json`, which loads as nothing:
    never the config of one with the weights of the other.
    """
    _sync_tree(staging)
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    stale = {path.relative_to(target) for pattern in WEIGHTS for path in target.glob(pattern)} - set(files)
    if stale or not _differ_by_one_file(staging, target, files):
        for name in MODEL_CONFIGS:
            (target / name).unlink(missing_ok=True)
        _sync(target)
    for path in stale:
        (target / path).unlink()
    for path in sorted(files, key=lambda path: str(path) in MODEL_CONFIGS):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        _sync(target)  # what was moved before is there before this
        (staging / path).replace(target / path)
    _sync(target)
    shutil.rmtree(staging, ignore_errors=True)


def discard(directory: Path) -> None:
    """Deletes a directory that a kill half-way must not leave under its name."""
    aside = directory.with_name(DISCARDED + directory.name)
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Deletes what killed processes left unfinished in a directory, and brings back what they had not yet replaced."""
    if not directory.is_dir():
        return
    for path in list(directory.iterdir()):
        if path.name.startswith(REPLACED) and not (final := path.with_name(path.name.removeprefix(REPLACED))).exists():
            with suppress(FileNotFoundError):  # another node that shares the file system did it
                path.rename(final)
        elif path.name.startswith((UNFINISHED, DISCARDED, REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def saving_errors(staging: Path, final: Path) -> Iterator[None]:
    """Makes one clear OSError of what torch, safetensors and the system raise when writing fails; frees the space."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITER_WORDS):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        reason = one_line(str(error))
        raise OSError(
            f"{final} could not be written, is the disk full? ({reason}); what was saved before it is untouched"
        ) from error


# torch.save raises a RuntimeError of its C++ writer.
_TORCH_WRITER_WORDS = ("PytorchStreamWriter", "inline_container", "cannot be opened")


def _differ_by_one_file(staging: Path, target: Path, files: list[Path]) -> bool:
    """Whether replacing a single file turns the old model into the new one."""
    filecmp.clear_cache()  # it goes by size and time, which two models saved at once may share
    same = [
        (target / path).is_file() and filecmp.cmp(target / path, staging / path, shallow=False)
        for path in files
        if path.name != KEPT
    ]
    return same.count(False) <= 1


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
