"""The directories of an unfinished compression, each there whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForImageClassification, PreTrainedModel

from kron_hf.calibration.result import CalibrationResult
from kron_hf.trainer.whole_files import discard, publish_directory, remove_leftovers, saving_errors, unfinished

__all__ = ["STAGES", "Stages"]

# Trainer pushes nothing that begins with an underscore.
DENSE, CALIBRATED, DISTILL, FINETUNE = "_dense", "_calibrated", "_distill", "_finetune"
STAGES = (DENSE, CALIBRATED, DISTILL, FINETUNE)


class Stages:
    """What a compression leaves on its way, in its output directory."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.dense, self.calibrated = output_dir / DENSE, output_dir / CALIBRATED
        self.distillation, self.finetuning = output_dir / DISTILL, output_dir / FINETUNE

    @property
    def have_dense(self) -> bool:
        """Whether there is a dense model with a head that was fitted here."""
        return self.dense.is_dir()

    @property
    def are_calibrated(self) -> bool:
        """Whether there is a calibrated model to go on with."""
        return self.calibrated.is_dir()

    def save_dense(self, model: PreTrainedModel) -> None:
        """Keeps the dense model whose head was fitted here."""
        _save(self.dense, model.save_pretrained)

    def save_calibrated(self, model: PreTrainedModel, result: CalibrationResult) -> None:
        """Keeps the calibrated model, after a table, JSON and a picture of the choice for the user."""
        (self.output_dir / "calibration.txt").write_text(f"{result}\n", encoding="utf-8")
        result.save_json(self.output_dir / "calibration.json")
        result.plot(self.output_dir / "calibration.png")
        _save(self.calibrated, model.save_pretrained)

    def load_dense(self) -> PreTrainedModel:
        """The dense model with its head."""
        return _load(self.dense)

    def load_calibrated(self) -> PreTrainedModel:
        """The calibrated model."""
        return _load(self.calibrated)

    def remove(self) -> None:
        """Removes what only an unfinished run needs; a dense model that was made here stays."""
        remove_leftovers(self.output_dir)
        for folder in (self.calibrated, self.distillation, self.finetuning):
            if folder.is_dir():
                discard(folder)


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval()


def _save(final: Path, save: Callable[[Path], object]) -> None:
    staging = unfinished(final)
    shutil.rmtree(staging, ignore_errors=True)
    with saving_errors(staging, final):
        save(staging)
        publish_directory(staging, final)
