"""`examples/experiments/cifar100/train.py` on a tiny data set in CIFAR-100's format, with shrunken models."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer

import kron_hf
from kron_hf import KronLinear

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments" / "cifar100"))

from augmentation import Augmentation
from augmented_trainer import AugmentedTrainer
from measuring import model_figures

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "experiments" / "cifar100" / "train.py"
spec = importlib.util.spec_from_file_location("cifar100_train", SCRIPT)
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4}
OFTEN = ["--method-options", '{"interval": 1}']
TARGET = ["--method", "kron_target", "--rank", 2, "--target-sparsity", 0.6, *OFTEN]
CLASSES = 10
COLUMNS = {
    *("experiment", "model", "method", "block_size", "rank", "target_sparsity", "seed", "learning_rate"),
    *("test_accuracy", "validation_accuracy", "sparsity", "nonzeros", "trained_params", "deployed_params"),
    *("seconds", "peak_memory_bytes", "steps", "versions"),
    *("l1", "options", "epochs", "max_steps", "global_batch"),
}


def write_cifar(folder, train=120, test=20):
    """Random images with CIFAR-100's columns: img, fine_label of 100 classes, coarse_label of 20."""
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=[f"fine{i}" for i in range(100)]),
            "coarse_label": datasets.ClassLabel(names=[f"coarse{i}" for i in range(20)]),
        }
    )
    generator = np.random.RandomState(0)
    for split, count in (("train", train), ("test", test)):
        labels = [i % CLASSES for i in range(count)]
        images = [Image.fromarray(generator.randint(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in labels]
        rows = {"img": images, "fine_label": labels, "coarse_label": [label // 5 for label in labels]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def command(data, output_dir, *more, overrides=VIT, steps=6):
    return [
        *("--dataset", str(data), "--output-dir", str(output_dir), "--model-overrides", json.dumps(overrides)),
        *("--image-size", "32", "--max-steps", str(steps), "--global-batch", "16", "--per-device-batch", "8"),
        *("--save-steps", "3", "--num-workers", "0", "--use-cpu", *map(str, more)),
    ]


def run_folder(output_dir):
    (folder,) = [path for path in output_dir.iterdir() if path.is_dir()]
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="module")
def rows(data, tmp_path_factory):
    """One run of each kind: its row and its folder."""
    kinds = {
        "dense": (["--method", "dense", "--save-steps", 6], VIT),
        "target": (TARGET, VIT),
        "l1": (
            [
                "--model",
                "swin-tiny",
                "--method",
                "kron_l1",
                "--l1",
                30,
                "--learning-rate",
                0.1,
                "--save-steps",
                6,
                *OFTEN,
            ],
            SWIN,
        ),
    }
    results = {}
    for name, (arguments, overrides) in kinds.items():
        output_dir = tmp_path_factory.mktemp(name)
        row = train.main(command(data, output_dir, *arguments, overrides=overrides))
        results[name] = (row, output_dir)
    return results


@pytest.mark.parametrize("kind", ["dense", "target", "l1"])
def test_a_run_appends_its_row_and_saves_a_model_that_loads(rows, kind):
    row, output_dir = rows[kind]
    (line,) = (output_dir / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == row
    assert row.keys() == COLUMNS
    assert row["steps"] == 6
    assert row["global_batch"] == 16
    assert 0 <= row["test_accuracy"] <= 1
    assert row["seconds"] > 0
    folder = run_folder(output_dir)
    model = AutoModelForImageClassification.from_pretrained(folder)
    figures = model_figures(model, None)
    assert {name: row[name] for name in figures} == figures
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 32
    assert model.config.id2label[3] == "fine3"


def test_sparsity_is_what_was_asked_for(rows):
    dense, target, l1 = (rows[kind][0] for kind in ("dense", "target", "l1"))
    assert (dense["sparsity"], dense["nonzeros"]) == (0.0, dense["trained_params"])
    assert (dense["block_size"], dense["rank"], dense["target_sparsity"]) == (None, None, None)
    assert (target["block_size"], target["rank"], target["target_sparsity"]) == ([4, 4], 2, 0.6)
    blocks = 2 * (4 * 64 + 2 * 128)  # two layers: four projections of 8 x 8 blocks, two of 8 x 16
    assert 0.6 <= target["sparsity"] < 0.6 + 1 / blocks
    assert target["nonzeros"] == target["trained_params"] - round(target["sparsity"] * blocks) * (1 + 2)
    assert target["trained_params"] < dense["trained_params"]
    assert 0 < l1["sparsity"] < 1
    assert (l1["l1"], l1["target_sparsity"], target["l1"]) == (30, None, None)


def test_the_rate_is_scaled_to_the_real_batch_and_stored_as_declared(rows):
    assert rows["target"][0]["learning_rate"] == 3e-4
    state = json.loads((run_folder(rows["target"][1]) / "checkpoint-6" / "trainer_state.json").read_text())
    args = torch.load(run_folder(rows["target"][1]) / "training_args.bin", weights_only=False)
    assert args.learning_rate == pytest.approx(3e-4 * 16 / 512)
    assert (args.warmup_steps, args.gradient_accumulation_steps, args.weight_decay) == (3, 2, 0.05)
    assert [entry["step"] for entry in state["log_history"] if "eval_accuracy" in entry] == [3, 6]


def test_a_finished_run_is_not_repeated(rows, data, monkeypatch):
    row, output_dir = rows["dense"]
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert train.main(command(data, output_dir, "--method", "dense")) == row
    assert len((output_dir / "results.jsonl").read_text().splitlines()) == 1


BASELINES = {
    "group_lasso": {"interval": 1},
    "elastic_group_lasso": {"interval": 1},
    "block_rigl": {"interval": 1},
    "iterative_pruning": {"rounds": 2},
    "gradual_pruning": {"interval": 1},
}


@pytest.mark.skipif(find_spec("kron_hf.baselines") is None, reason="this kron_hf has no baselines")
@pytest.mark.parametrize(
    "method", [name if name == "gradual_pruning" else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES]
)
def test_baselines_prune_the_dense_model(method, data, tmp_path):
    options = ["--method-options", json.dumps(BASELINES[method])]
    row = train.main(command(data, tmp_path, "--method", method, "--target-sparsity", 0.5, *options))
    assert row["sparsity"] == 0.5
    assert row["block_size"] == [4, 4]
    assert row["nonzeros"] == row["trained_params"] - 2 * (4 * 32 * 32 + 2 * 32 * 64) // 2
    model = AutoModelForImageClassification.from_pretrained(run_folder(tmp_path))
    assert model_figures(model, 4)["sparsity"] == 0.5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(kron_hf, "BlockSizeCallback"), reason="this kron_hf has no selection")
def test_a_block_size_is_selected_and_the_run_resumes_after_the_choice(data, tmp_path):
    method = ["--method", "selection", "--method-options", '{"eval_batches": 1}']
    arguments = command(data, tmp_path, *method, steps=8)
    row = train.main(arguments)
    assert row["block_size"] in ([[2, 2]], [[4, 4]], [[8, 8]])
    assert row["sparsity"] == 0
    whole = load_file(run_folder(tmp_path) / "model.safetensors")
    (tmp_path / "results.jsonl").unlink()
    again = train.main(arguments)  # goes on from checkpoint-6, trained on with the chosen size
    assert {key: again[key] for key in ("block_size", "steps", "validation_accuracy", "test_accuracy")} == {
        key: row[key] for key in ("block_size", "steps", "validation_accuracy", "test_accuracy")
    }
    found = load_file(run_folder(tmp_path) / "model.safetensors")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(rows, data, tmp_path, monkeypatch):
    """The kill is after the checkpoint of step 3, in the second half of step 5."""
    original, calls = AugmentedTrainer.compute_loss, []

    def dying(self, model, *args, **kwargs):
        calls.append(model.training)
        if sum(calls) == 10:
            raise Killed
        return original(self, model, *args, **kwargs)

    arguments = command(data, tmp_path, *TARGET)
    monkeypatch.setattr(AugmentedTrainer, "compute_loss", dying)
    with pytest.raises(Killed):
        train.main(arguments)
    monkeypatch.setattr(AugmentedTrainer, "compute_loss", original)
    draws, augment = [], Augmentation.__call__

    def recording(self, images, labels, **place):
        draws.append((place["step"], place["micro_batch"], place["rank"], len(images)))
        return augment(self, images, labels, **place)

    monkeypatch.setattr(Augmentation, "__call__", recording)
    row, (expected, output_dir) = train.main(arguments), rows["target"]
    assert draws == [(step, micro_batch, 0, 8) for step in (3, 4, 5) for micro_batch in (0, 1)]  # never to evaluate
    measured = ("seconds", "peak_memory_bytes")
    assert {key: row[key] for key in row if key not in measured} == {
        key: expected[key] for key in expected if key not in measured
    }
    resumed, whole = (load_file(run_folder(path) / "model.safetensors") for path in (tmp_path, output_dir))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_folder_of_another_run_is_refused(rows, data, tmp_path):
    folder = tmp_path / run_folder(rows["dense"][1]).name
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train.main(command(data, tmp_path, "--method", "dense"))


@pytest.mark.parametrize(("option", "sizes"), [([], [10, 20]), (["--validation-only"], [10])], ids=["both", "one"])
def test_all_images_are_evaluated_and_test_images_once_or_not_at_all(data, tmp_path, monkeypatch, option, sizes):
    read, accuracy = [], train._accuracy
    monkeypatch.setattr(AugmentedTrainer, "train", lambda *_, **__: None)
    monkeypatch.setattr(train, "_accuracy", lambda seen: read.append(len(seen.label_ids)) or accuracy(seen))
    row = train.main(command(data, tmp_path, "--method", "dense", *option))
    assert read == sizes
    assert (row["test_accuracy"] is None) == bool(option)
    assert 0 <= row["validation_accuracy"] <= 1


def test_a_dry_run_only_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "describe", lambda plan: f"would run {plan.name()}")
    assert train.main(command("nowhere", tmp_path, "--method", "dense", "--dry-run")) is None
    assert capsys.readouterr().out.startswith("would run experiment-cifar100_model-vit-tiny_method-dense")
    assert not list(tmp_path.iterdir())


# Dies in the second half of step 5, after the checkpoint of step 3.
DYING = """
import sys
sys.path.insert(0, {folder!r})
import augmented_trainer, train
original, calls = augmented_trainer.AugmentedTrainer.compute_loss, []
def dying(self, model, *args, **kwargs):
    calls.append(model.training)
    if sum(calls) == {call}:
        raise SystemExit(7)
    return original(self, model, *args, **kwargs)
augmented_trainer.AugmentedTrainer.compute_loss = dying
train.main()
"""


@pytest.mark.slow
def test_two_processes_under_accelerate_resume_to_the_same_bits(data, tmp_path):
    config = ROOT / "examples" / "accelerate" / "cpu_2_processes.yaml"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "dying.py").write_text(DYING.format(folder=str(SCRIPT.parent), call=5))

    def launch(script, output_dir):
        arguments = command(data, output_dir, "--method", "kron_target", "--target-sparsity", 0.5, *OFTEN)
        words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
        return subprocess.run([*words, *arguments], env=environment, capture_output=True, text=True, check=False)

    done = launch(SCRIPT, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 steps of 16 images, from scratch") == 1  # one process speaks
    assert launch(tmp_path / "dying.py", tmp_path / "resumed").returncode != 0
    whole, resumed = (run_folder(tmp_path / name) for name in ("whole", "resumed"))
    assert [path.name for path in resumed.glob("checkpoint-*")] == ["checkpoint-3"]
    done = launch(SCRIPT, tmp_path / "resumed")
    assert done.returncode == 0, done.stderr
    assert f"from {resumed / 'checkpoint-3'}" in done.stdout
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows = [json.loads((tmp_path / name / "results.jsonl").read_text()) for name in ("whole", "resumed")]
    assert [row["sparsity"] for row in rows] == [0.5, 0.5]
    assert rows[0]["test_accuracy"] == rows[1]["test_accuracy"]
    model = AutoModelForImageClassification.from_pretrained(whole)
    assert sum(isinstance(module, KronLinear) for module in model.modules()) == 12
