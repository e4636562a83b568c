import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

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
        pytest.param("train_with_accelerate.py", ["--epochs", 2], id="accelerate"),
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


@pytest.mark.parametrize("name", ["train_with_trainer.py", "train_with_accelerate.py"])
def test_examples_stay_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 120
