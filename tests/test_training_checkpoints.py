"""Trainer's own checkpoints of a Kronecker model: resume, load_best_model_at_end, torch.compile."""

import pytest
import torch
from families import VIT_SIZES
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from kron_hf import KronConfig, KronTrainer, get_kron_model


class Images(Dataset):
    """Images whose class is the brightest of four channels' quadrants, so that training has something to learn."""

    def __init__(self, count: int = 32):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(0, 4, (count,), generator=generator)
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator)
        for image, label in zip(self.pixels, self.labels, strict=True):
            row, column = divmod(int(label), 2)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def build(seed: int = 0):
    torch.manual_seed(seed)
    vit = ViTForImageClassification(ViTConfig(**VIT_SIZES, num_labels=4, hidden_dropout_prob=0.1))
    return get_kron_model(vit, KronConfig(block_size=(4, 8), rank=1))


def arguments(folder, **options):
    defaults = {
        "max_steps": 8,
        "save_steps": 4,
        "save_strategy": "steps",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["fresh model", "loaded checkpoint"])
def test_resume_equals_the_uninterrupted_run(tmp_path, start):
    whole = build()
    Trainer(whole, arguments(tmp_path), train_dataset=Images()).train()
    checkpoint = tmp_path / "checkpoint-4"
    model = build(seed=1) if start == "fresh model" else AutoModelForImageClassification.from_pretrained(checkpoint)
    Trainer(model, arguments(tmp_path / "resumed"), train_dataset=Images()).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert_equal(model.state_dict(), whole.state_dict())


def test_a_trainer_checkpoint_loads_as_a_model(tmp_path):
    model = build()
    Trainer(model, arguments(tmp_path), train_dataset=Images()).train()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert load_file(tmp_path / "checkpoint-8" / "model.safetensors").keys() == model.state_dict().keys()


def test_load_best_model_at_end_restores_every_tensor(tmp_path):
    model = build()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1.0}
    trainer = Trainer(
        model,
        arguments(tmp_path, metric_for_best_model="loss", **options),
        train_dataset=Images(),
        eval_dataset=Images(8),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith(f"checkpoint-{min(trainer.state.log_history, key=lambda e: e.get('eval_loss', 1e9))['step']}")
    assert_equal(model.state_dict(), AutoModelForImageClassification.from_pretrained(best).state_dict())


@pytest.mark.slow
def test_trainer_on_a_compiled_model(tmp_path):
    plain, compiled = build(), build()
    Trainer(plain, arguments(tmp_path / "plain", max_steps=2), train_dataset=Images()).train()
    options = {"max_steps": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = Trainer(compiled, arguments(tmp_path / "compiled", **options), train_dataset=Images())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.state_dict(), plain.state_dict())


@pytest.mark.slow
def test_training_a_compiled_model_object(tmp_path):
    plain, model = build(), build()
    options = {"max_steps": 2, "save_strategy": "no", "remove_unused_columns": False}
    Trainer(plain, arguments(tmp_path, **options), train_dataset=Images()).train()
    compiled = torch.compile(model, backend="aot_eager")
    Trainer(compiled, arguments(tmp_path, **options), train_dataset=Images()).train()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    states = []
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # in transformers 5.23
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    for enabled in (False, True):
        model = build()
        options = {"max_steps": 3, "save_strategy": "no", name: enabled}
        Trainer(model, arguments(tmp_path, **options), train_dataset=Images()).train()
        states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1])


def test_training_moves_every_factor(tmp_path):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    Trainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=Images()).train()
    unmoved = [name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])]
    assert unmoved == []


def test_the_card_of_a_sharded_model_is_written_without_counting(tmp_path, monkeypatch):
    """Under FSDP the main process is alone here: a collective would wait for ever."""
    trainer = KronTrainer(build(), arguments(tmp_path))
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr("kron_hf.model_card.usage.kron_summary", lambda model: pytest.fail("counted"))
    trainer.create_model_card(model_name="tiny")
    assert "import kron_hf" in (tmp_path / "README.md").read_text()


def test_a_dense_model_whose_tensors_transformers_renames_resumes_bit_equal(tmp_path):
    """Trainer loads by the names of the model, also the best one at the end, but the stock one writes older names."""

    def run(name, seed, **resume):
        torch.manual_seed(seed)
        model = ViTForImageClassification(ViTConfig(**VIT_SIZES, num_labels=4))
        options = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "x",
        }
        trainer = KronTrainer(
            model,
            arguments(tmp_path / name, max_steps=6, save_steps=2, **options),
            train_dataset=Images(),
            eval_dataset=Images(8),
            compute_metrics=lambda _: {"x": -trainer.state.global_step},  # the first is the best
        )
        trainer.train(**resume)
        trainer.save_model()
        return trainer

    whole = run("whole", 0)
    first = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    torch.testing.assert_close(whole.model.state_dict(), first, rtol=0, atol=0)
    resumed = run("resumed", 1, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    last = [load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "resumed")]
    torch.testing.assert_close(*last, rtol=0, atol=0)
    # The model itself is saved as transformers does.
    whole.model.save_pretrained(tmp_path / "ordinary")
    saved = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("whole", "ordinary")]
    assert saved[0] == saved[1] != whole.model.state_dict().keys()
    assert resumed.state.global_step == 6
