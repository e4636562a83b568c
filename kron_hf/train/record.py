"""Remembers in the output directory what is trained there, so that the same command goes on and no other does."""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from kron_hf.train.parser import Options
from kron_hf.trainer.whole_files import discard, remove_leftovers

__all__ = ["RunRecord", "check_output_dir"]

FILE = "_kron_train.json"  # Trainer pushes nothing that begins with an underscore
# What changes the trained model; anything else may differ when a run goes on.
TRAINING = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("bf16", "fp16", "seed", "data_seed", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


class RunRecord:
    """The settings of the run in an output directory and, once it is finished, its figures."""

    def __init__(self, output_dir: Path, settings: dict[str, Any], results: dict[str, float] | None = None) -> None:
        self.output_dir, self.settings, self.results = output_dir, settings, results

    def begin(self, *, overwrite: bool) -> None:
        """Marks the directory as that of this run, after removing an earlier one if that is to be overwritten."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        overwrite = overwrite and (self.output_dir / FILE).is_file()
        if overwrite:
            _remove_checkpoints(self.output_dir)
        # Between the two: this run never goes on from checkpoints of the other, the other is never finished without its
        # model, and without any record the rest would be a stranger's.
        self._write()
        if overwrite:
            _remove_model(self.output_dir)

    def finish(self, results: dict[str, float]) -> None:
        """Marks the run as finished."""
        self.results = results
        self._write()

    def _write(self) -> None:
        """Whole or not at all."""
        content = {"settings": self.settings, "results": self.results}
        partial = self.output_dir / f"{FILE}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.output_dir / FILE)


def check_output_dir(options: Options) -> RunRecord:
    """Checks that the output directory is empty, or holds this very run, or is to be overwritten; changes nothing.

    Raises:
        FileExistsError: The directory is a file, or holds something else.
        ValueError: It holds a run with other settings.
    """
    output_dir = Path(options.training.output_dir or ".")
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"the output directory {output_dir} is a file")
    file, settings = output_dir / FILE, _settings(options)
    if not file.is_file():
        if output_dir.is_dir() and any(not path.name.startswith(FILE) for path in output_dir.iterdir()):
            raise FileExistsError(
                f"the output directory {output_dir} is not empty and was not written by kron-hf train; name another one"
            )
        return RunRecord(output_dir, settings)
    if options.run.overwrite:
        return RunRecord(output_dir, settings)
    earlier = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in settings if settings[name] != earlier["settings"].get(name)]
    # Without a checkpoint there is nothing to go on with, so nothing to protect.
    if changed and (earlier["results"] is not None or any(output_dir.glob("checkpoint-*"))):
        before = earlier["settings"]
        shown = [f"--{name.replace('_', '-')} {before.get(name)!r}, now {settings[name]!r}" for name in changed[:5]]
        raise ValueError(
            f"{output_dir} holds a run with other settings ({'; '.join(shown)}); repeat that command to go on with it, "
            "pass --overwrite to start anew, or name another --output-dir"
        )
    return RunRecord(output_dir, settings, earlier["results"])


def _remove_checkpoints(output_dir: Path) -> None:
    remove_leftovers(output_dir)  # first, since it may bring back a checkpoint
    for path in output_dir.glob("checkpoint-*"):
        if path.is_dir():
            discard(path)


def _remove_model(output_dir: Path) -> None:
    for name in MODEL_FILES:
        (output_dir / name).unlink(missing_ok=True)
    for path in output_dir.glob("model-*-of-*.safetensors"):
        path.unlink()


def _settings(options: Options) -> dict[str, Any]:
    training = {name: getattr(options.training, name) for name in TRAINING}
    every = {**asdict(options.model), **asdict(options.data), **asdict(options.kron), **training}
    return json.loads(json.dumps(every, default=lambda value: value.value if isinstance(value, Enum) else str(value)))
