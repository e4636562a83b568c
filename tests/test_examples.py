import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2Model

from kron_hf import kron_summary

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), "--dataset", "digits", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        pytest.param("train_with_trainer.py", ["--max-steps", 40], id="trainer"),
        pytest.param("train_with_accelerate.py", ["--epochs", 2], id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_example_trains_saves_and_reports_what_it_saved(name, budget, tmp_path):
    out = run_example(name, *budget, "--output-dir", tmp_path, "--target-sparsity", 0.6, "--block-size", 4, 16)
    summary = kron_summary(AutoModelForImageClassification.from_pretrained(tmp_path))
    assert str(summary) in out
    assert {line.block_size for line in summary.layers} == {(4, 16)}
    largest_block_share = 4 * 16 / sum(line.dense_forward_flops // 2 for line in summary.layers)
    assert 0.6 <= summary.sparsity < 0.6 + largest_block_share
    accuracy = float(out.split("test accuracy ")[1].split(",")[0])
    assert accuracy > 0.2  # 40 steps: well above chance


@pytest.mark.slow
def test_dinov2_is_compressed_saved_and_compared(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, initializer_range=0.1)).save_pretrained(tmp_path / "backbone")
    size = ["--model", tmp_path / "backbone", "--image-size", 28, "--target-params", 0.5, "--calibration-images", 64]
    out = run_example(
        "compress_dinov2.py", *size, "--distill-steps", 2, "--finetune-steps", 2, "--output-dir", tmp_path
    )
    summary = kron_summary(AutoModelForImageClassification.from_pretrained(tmp_path))
    assert f"deployed parameters: dense {summary.dense_params:,}, compressed {summary.deployed_params:,}" in out
    assert summary.deployed_params < summary.dense_params
    assert "layers converted" in out
    for stage in ("calibrated", "distilled", "fine-tuned"):
        assert float(out.split(f"{stage}: validation accuracy ")[1].split()[0]) > 0.2
    assert float(out.split("test accuracy: dense ")[1].split(",")[0]) > 0.3  # a head on features of random weights
    assert (tmp_path / "calibration.png").is_file()
    assert "import kron_hf" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_students_are_trained_alone_and_with_a_teacher(tmp_path):
    size = ["--epochs", 1, "--seeds", 2, "--learning-rates", 1e-3, 3e-3, "--output-dir", tmp_path]
    table = run_example("distill_from_scratch.py", *size).splitlines()[-3:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [name for name, _, _ in cells] == ["dense, the teacher", "student alone", "student with the teacher"]
    assert {float(rate) for _, rate, _ in cells} <= {1e-3, 3e-3}
    assert all(0 < float(accuracy.split(" ± ")[0]) <= 1 for _, _, accuracy in cells)
    assert all("±" in accuracy for _, _, accuracy in cells[1:])


NAMES = ["train_with_trainer.py", "train_with_accelerate.py", "compress_dinov2.py", "distill_from_scratch.py"]


@pytest.mark.parametrize("name", NAMES)
def test_examples_stay_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 120
