"""Remembers in the output directory what is made there, so that the same command goes on and no other does."""

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from kron_hf.trainer.whole_files import discard, remove_leftovers

__all__ = ["RunRecord", "check_overwritten", "open_record", "plain_settings"]

CHECKPOINTS = ("checkpoint-*",)
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


class RunRecord:
    """The settings of the run in an output directory and, once it is finished, its figures.

    Args:
        path: The file; its name begins with an underscore, so that Trainer does not push it.
        settings: What makes the run what it is, in plain JSON types.
        results: Its figures; None until it is finished.
        stages: Patterns of the directories that an unfinished run leaves to go on with.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        results: dict[str, Any] | None = None,
        *,
        stages: Sequence[str] = CHECKPOINTS,
    ) -> None:
        self.path, self.settings, self.results, self.stages = path, settings, results, stages

    @property
    def output_dir(self) -> Path:
        """Where it is."""
        return self.path.parent

    def begin(self, *, overwrite: bool) -> None:
        """Marks the directory as that of this run, after removing an earlier one if that is to be overwritten."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        overwrite = overwrite and self.path.is_file()
        if overwrite:
            self.remove_stages()
        # Between the two: this run never goes on from checkpoints of the other, the other is never finished without its
        # model, and without any record the rest would be a stranger's.
        self._write()
        if overwrite:
            _remove_model(self.output_dir)

    def finish(self, results: dict[str, Any]) -> None:
        """Marks the run as finished."""
        self.results = results
        self._write()

    def remove_stages(self) -> None:
        """Removes what an unfinished run goes on with."""
        remove_leftovers(self.output_dir)  # first, since it may bring back a checkpoint
        for path in _stages(self.output_dir, self.stages):
            discard(path)

    def _write(self) -> None:
        """Whole or not at all."""
        content = {"settings": self.settings, "results": self.results}
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)


def open_record(
    command: str,
    output_dir: Path,
    settings: dict[str, Any],
    *,
    overwrite: bool,
    stages: Sequence[str] = CHECKPOINTS,
) -> RunRecord:
    """Checks that the output directory is empty, or holds this very run, or is to be overwritten; changes nothing.

    Args:
        command: Name of the command, as in `train`.
        output_dir: The directory.
        settings: What makes the run what it is, in plain JSON types, by the names of the options.
        overwrite: Whether an earlier run of the command may be lost.
        stages: Patterns of the directories that an unfinished run leaves to go on with.

    Raises:
        FileExistsError: The directory is a file, or holds something else.
        ValueError: It holds a run with other settings.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"the output directory {output_dir} is a file")
    record = RunRecord(output_dir / f"_kron_{command}.json", settings, stages=stages)
    file = record.path
    if not file.is_file():
        if output_dir.is_dir() and any(not path.name.startswith(file.name) for path in output_dir.iterdir()):
            raise FileExistsError(
                f"the output directory {output_dir} is not empty and was not written by kron-hf {command}; name "
                "another one"
            )
        return record
    if overwrite:
        return record
    earlier = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in settings if settings[name] != earlier["settings"].get(name)]
    # Without a checkpoint there is nothing to go on with, so nothing to protect.
    if changed and (earlier["results"] is not None or _stages(output_dir, stages)):
        before = earlier["settings"]
        shown = [f"--{name.replace('_', '-')} {before.get(name)!r}, now {settings[name]!r}" for name in changed[:5]]
        raise ValueError(
            f"{output_dir} holds a run with other settings ({'; '.join(shown)}); repeat that command to go on with it, "
            "pass --overwrite to start anew, or name another --output-dir"
        )
    record.results = earlier["results"]
    return record


def check_overwritten(model: str, output_dir: str) -> None:
    """Refuses to overwrite what a run starts from.

    Raises:
        ValueError: The model lies in the output directory.
    """
    if Path(model).resolve().is_relative_to(Path(output_dir).resolve()):
        raise ValueError(
            f"--overwrite would delete the model that --model names: {model} lies in the output directory "
            f"{output_dir}; name another --output-dir"
        )


def plain_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings in the types that JSON gives back."""
    return json.loads(json.dumps(values, default=lambda value: value.value if isinstance(value, Enum) else str(value)))


def _stages(output_dir: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in output_dir.glob(pattern) if path.is_dir()]


def _remove_model(output_dir: Path) -> None:
    for name in MODEL_FILES:
        (output_dir / name).unlink(missing_ok=True)
    for path in output_dir.glob("model-*-of-*.safetensors"):
        path.unlink()
