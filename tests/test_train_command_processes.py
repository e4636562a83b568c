"""`kron-hf train` under `accelerate launch` and torchrun, with the config files of `examples/accelerate`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_runs import assert_equal, checkpoints, command, write_idx_folder
from transformers import AutoModelForImageClassification

from kron_hf import kron_summary

CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate"
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file"]
LAUNCHERS = {
    "one": [*ACCELERATE, str(CONFIGS / "cpu_1.yaml"), "-m", "kron_hf"],
    "two": [*ACCELERATE, str(CONFIGS / "cpu_2_processes.yaml"), "-m", "kron_hf"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "kron_hf"],
}
FILES = {
    "cpu_1.yaml": ("NO", 1),
    "cpu_2_processes.yaml": ("MULTI_GPU", 2),
    "gpus.yaml": ("MULTI_GPU", 2),
    "fsdp2.yaml": ("FSDP", 2),
}


def launch(launcher, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *LAUNCHERS[launcher], *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same global batches on one process and on two, and what each launch printed."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_idx_folder(folder / "data")
    printed = {}
    for launcher in LAUNCHERS:
        # Sizes that divide the 72 images: on two processes Accelerate would fill up the last batch of an epoch.
        batch = ["--per-device-train-batch-size", 12 if launcher == "one" else 6]
        done = launch(launcher, *command(data, folder / launcher / "run", *batch, steps=20, every=10))
        assert done.returncode == 0, done.stderr
        printed[launcher] = done.stdout
    return folder, printed


@pytest.mark.parametrize("name", FILES)
def test_config_files_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    assert {path.name for path in CONFIGS.iterdir()} == FILES.keys()
    config = load_config_from_file(str(CONFIGS / name))
    assert (config.distributed_type.value, config.num_processes) == FILES[name]
    assert f"accelerate launch --config_file examples/accelerate/{name}" in (CONFIGS / name).read_text()
    assert yaml.safe_load((CONFIGS / name).read_text())["num_machines"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "world"), [("one", 1), ("two", 2), ("torchrun", 2)])
def test_the_world_has_the_size_that_was_asked_for(runs, launcher, world):
    found = checkpoints(runs[0] / launcher / "run")
    assert [path.name for path in found] == ["checkpoint-10", "checkpoint-20"]
    expected = ["rng_state.pth"] if world == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
    assert all(sorted(path.name for path in folder.glob("rng_state*")) == expected for folder in found)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_process_speaks(runs, launcher):
    printed = runs[1][launcher]
    for once in ("images of 4 classes to train", "validation accuracy", "converted layers, of dense", "card are in"):
        assert printed.count(once) == 1


@pytest.mark.slow
def test_both_launchers_give_the_same_bits(runs):
    weights = [load_file(runs[0] / launcher / "run" / "model.safetensors") for launcher in ("two", "torchrun")]
    assert_equal(*weights)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(runs):
    one, two = (json.loads((runs[0] / name / "run" / "all_results.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name  # float32 sums in another order
    model = AutoModelForImageClassification.from_pretrained(runs[0] / "two" / "run")
    assert kron_summary(model).sparsity == two["sparsity"] >= 0.5


@pytest.mark.slow
def test_an_error_is_told_once(runs, tmp_path):
    done = launch("two", *command(tmp_path / "missing", tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("kron-hf: error: ") == 1
    assert "there is no such folder" in done.stderr
