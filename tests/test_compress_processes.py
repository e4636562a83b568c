"""`kron-hf compress` killed with -9 after each of its stages, and its model in a fresh process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_compress import command, trained
from tiny_runs import fork_server

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "calibration.json", "calibration.txt")
FRESH = """
import json, sys
import torch
from transformers import AutoModelForImageClassification
import kron_hf
from tiny_compress import digits
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
pixels, labels = digits("test")
with torch.no_grad():
    hits = model(pixel_values=pixels).logits.argmax(-1) == labels
print(json.dumps(hits.double().mean().item()))
"""


@pytest.fixture(scope="module")
def server():
    with fork_server() as started:
        yield started


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A backbone to compress, and the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trained().vit.save_pretrained(folder / "backbone")
    assert server.run(words(folder, folder / "run"), folder / "log") == 0, (folder / "log").read_text()
    return folder


def words(folder, output):
    return command(folder / "backbone", output, "--target-params", 0.5, distill=30, finetune=30)


def figures(output):
    """What was measured of the models, without times."""
    comparison = json.loads((output / "comparison.json").read_text())
    for values in (comparison["dense"], comparison["compressed"]):
        for name in ("milliseconds_1", "milliseconds_32"):
            del values[name]
    return {name: comparison[name] for name in ("dense", "compressed", "stages")}


def await_any(pattern, output, pid, limit=300.0):
    end = time.monotonic() + limit
    while time.monotonic() < end and not any(output.glob(pattern)):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


MOMENTS = {
    "a head was fitted": ["_dense"],
    "saving the calibrated model": ["_unfinished-_calibrated*"],
    "calibrated": ["_calibrated"],
    "distilling": ["_distill/checkpoint-*"],
    "saving a checkpoint": ["_distill/_unfinished-*"],
    "fine-tuning": ["_finetune/checkpoint-*"],
    "saving the model": ["_unfinished-model*"],
    "each of them": ["_calibrated", "_distill/checkpoint-12", "_finetune/checkpoint-3", "comparison.json"],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_it_goes_on_to_the_same_model(server, whole, tmp_path, moment):
    output, log = tmp_path / "run", tmp_path / "log"
    for pattern in MOMENTS[moment]:
        pid = server.start(words(whole, output), log)
        await_any(pattern, output, pid)
        assert server.wait(pid) == -signal.SIGKILL, log.read_text()
        assert not (output / "config.json").exists() or (output / "model.safetensors").exists()
    assert server.run(words(whole, output), log) == 0, log.read_text()
    for name in FILES:
        assert (output / name).read_bytes() == (whole / "run" / name).read_bytes(), name
    assert figures(output) == figures(whole / "run")
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["_dense"]


def test_a_fresh_process_loads_what_was_measured(whole):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in (TESTS, TESTS.parent))}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, whole / "run"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(figures(whole / "run")["compressed"]["test_accuracy"])
