"""Trainer and Accelerate on two processes (distributed_trainer_checks.py), and what one process makes of it."""

import shutil

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from distributed_trainer_checks import ALONE, CHECKS, TARGET, trainer, vit
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from two_processes import run

from kron_hf.sparsity.pruning import block_masks, kron_layers, model_sparsity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run on one process, with the same global batches."""
    folder = tmp_path_factory.mktemp("one")
    trainer(folder, processes=1).train()
    return folder


@pytest.fixture(scope="module")
def two(alone, tmp_path_factory):
    """The folder of the checks on two processes, and their results."""
    folder = tmp_path_factory.mktemp("two")
    for check in ALONE:
        shutil.copytree(alone, folder / check / "one")
    return folder, run("distributed_trainer_checks.py", CHECKS, folder, timeout=300)


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(two, check):
    _, results = two
    assert results[check]["error"] is None, results[check]["error"]


def assert_is_the_model_of_one_process(model, alone):
    """Float64: the same masks, and weights up to the order of sums."""
    expected = AutoModelForImageClassification.from_pretrained(alone / "checkpoint-40")
    masks, other = block_masks(kron_layers(model)), block_masks(kron_layers(expected))
    assert all(torch.equal(mask, each) for mask, each in zip(masks, other, strict=True))
    assert TARGET <= model_sparsity(model) < TARGET + 0.01
    reference = expected.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("check", ["ddp", "fsdp2_full"])
@pytest.mark.parametrize("saved", ["saved", "whole/checkpoint-40"])
def test_what_two_processes_saved_loads_on_one(two, alone, check, saved):
    model = AutoModelForImageClassification.from_pretrained(two[0] / check / saved)
    assert_is_the_model_of_one_process(model, alone)
    zeros = [tensor == 0 for name, tensor in model.state_dict().items() if name.endswith(".s")]
    assert all(torch.equal(z, layer.dead_blocks) for z, layer in zip(zeros, kron_layers(model), strict=True))


def test_a_sharded_checkpoint_merges_into_the_model_of_one_process(two, alone, tmp_path):
    checkpoint = two[0] / "fsdp2_sharded" / "whole" / "checkpoint-40"
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path))
    model = vit(seed=1)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_is_the_model_of_one_process(model, alone)


@pytest.mark.parametrize("at", [15, 30], ids=["in-the-ramp", "after-the-freeze"])
def test_one_process_resumes_what_two_saved(two, alone, tmp_path, at):
    resumed = trainer(tmp_path, processes=1, seed=1)
    resumed.train(resume_from_checkpoint=str(two[0] / "ddp" / "whole" / f"checkpoint-{at}"))
    assert_is_the_model_of_one_process(resumed.model, alone)


@pytest.mark.parametrize("at", [15, 30], ids=["in-the-ramp", "after-the-freeze"])
def test_two_processes_resume_what_one_saved(two, alone, at):
    folder = two[0] / "resume_what_one_process_saved" / f"ddp{at}" / "saved"
    assert_is_the_model_of_one_process(AutoModelForImageClassification.from_pretrained(folder), alone)
