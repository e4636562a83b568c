"""The disk is full while a checkpoint or a model is written."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_safe_saving import names, trainer_in, trainer_weights

from kron_hf import last_checkpoint


def fail_after(monkeypatch, module, name, calls, error, leave=b"half"):
    """From the given call on, a writer leaves part of its file and raises."""
    original, made = getattr(module, name), []

    def write(value, file, *args, **kwargs):
        made.append(file)
        if len(made) < calls:
            return original(value, file, *args, **kwargs)
        with open(file, "wb") as handle:  # noqa: PTH123
            handle.write(leave)
        raise error

    monkeypatch.setattr(module, name, write)
    return made


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
WRITER = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0: PytorchStreamWriter failed")


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        pytest.param(5, NO_SPACE, id="training_args", marks=pytest.mark.slow),
        pytest.param(6, WRITER, id="optimizer"),
        pytest.param(7, NO_SPACE, id="scheduler", marks=pytest.mark.slow),
        pytest.param(8, WRITER, id="rng"),
    ],
)
def test_disk_full_while_a_checkpoint_is_written(tmp_path, monkeypatch, calls, error):
    trainer = trainer_in(tmp_path)
    made = fail_after(monkeypatch, torch, "save", calls, error)
    with pytest.raises(OSError, match=r"checkpoint-8 could not be written, is the disk full\? \(.*untouched"):
        trainer.train()
    assert len(made) == calls
    assert names(tmp_path) == ["checkpoint-4"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    monkeypatch.undo()
    resumed = trainer_in(tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_disk_full_while_a_model_is_saved_over_another(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path)
    trainer.save_model(tmp_path / "out")
    before = trainer_weights(tmp_path / "out")
    with torch.no_grad():
        trainer.model.classifier.bias.add_(1)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def save(model, folder, **kwargs):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise full

    monkeypatch.setattr(type(trainer.model), "save_pretrained", save)
    with pytest.raises(OSError, match=r"out could not be written, is the disk full\? \(Error while serializing"):
        trainer.save_model(tmp_path / "out")
    monkeypatch.undo()
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "training_args.bin"]
    torch.testing.assert_close(trainer_weights(tmp_path / "out"), before, rtol=0, atol=0)
