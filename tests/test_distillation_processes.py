"""Distillation on two processes (distillation_checks.py) against one process, in float64."""

import pytest
import torch
from distillation_checks import CASES, CHECKS, logged, trainer
from two_processes import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the checks on two processes, and their results."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run("distillation_checks.py", CHECKS, folder, timeout=300)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_train_as_one(two, name, tmp_path):
    folder, results = two
    assert results[name]["error"] is None, results[name]["error"]
    one = trainer(tmp_path, name, 1)
    one.train()
    if CASES[name][1]:
        one.evaluate()
    state = torch.load(folder / name / "state.pt", weights_only=True)
    expected = one.model.state_dict()
    assert {key for key in expected if expected[key].numel()} <= state.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")
    for got, expected in zip(results[name]["figures"], logged(one), strict=True):
        assert got == pytest.approx(expected)
    assert any("distill_tokens" in entry for entry in results[name]["figures"])
