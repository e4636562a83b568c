"""Block-size selection on two processes (selection_checks.py), and what one process makes of it."""

import json

import pytest
import torch
from selection_checks import CHECKS, UNCLIPPED, trainer
from tiny_selection import callback_in
from transformers import AutoModelForImageClassification
from two_processes import run

from kron_hf import KronLinear
from kron_hf.selection import KronCandidates, replace_by_chosen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the checks on two processes, and their results."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run("selection_checks.py", CHECKS, folder, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one process, with the same global batches."""
    made = trainer(tmp_path_factory.mktemp("one"), processes=1, **UNCLIPPED)
    made.train()
    return made


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(two, check):
    _, results = two
    assert results[check]["error"] is None, results[check]["error"]


@pytest.mark.parametrize("check", ["trainer_ddp", "trainer_fsdp2"])
def test_two_processes_choose_what_one_does(two, alone, check):
    folder = two[0] / check
    assert json.loads((folder / "config.json").read_text()) == callback_in(alone).config.modules
    model = AutoModelForImageClassification.from_pretrained(folder / "saved")
    if check == "trainer_fsdp2":
        replace_by_chosen(model)
    assert not any(isinstance(module, KronCandidates) for module in model.modules())
    assert any(isinstance(module, KronLinear) for module in model.modules())
    expected = alone.model.state_dict()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("at", [8, 12], ids=["in the middle", "after the end"])
def test_one_process_resumes_what_two_saved(two, alone, tmp_path, at):
    resumed = trainer(tmp_path, processes=1, seed=1, **UNCLIPPED)
    resumed.train(resume_from_checkpoint=str(two[0] / "trainer_ddp" / "whole" / f"checkpoint-{at}"))
    expected = alone.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
