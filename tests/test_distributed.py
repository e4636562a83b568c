"""Masks and penalties on two processes. What is checked stands in distributed_checks.py; a launch runs many checks."""

import distributed_checks
import pytest
from two_processes import run


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return run("distributed_checks.py", distributed_checks.CORE, tmp_path_factory.mktemp("core"), timeout=240)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run("distributed_checks.py", distributed_checks.MORE, tmp_path_factory.mktemp("more"), timeout=240)


@pytest.mark.parametrize("check", distributed_checks.CORE)
def test_core(core, check):
    assert core[check]["error"] is None, core[check]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("check", distributed_checks.MORE)
def test_more(more, check):
    assert more[check]["error"] is None, more[check]["error"]
