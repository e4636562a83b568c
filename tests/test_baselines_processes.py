"""The baselines on two processes. What is checked stands in baselines_checks.py; one launch runs all checks."""

import baselines_checks
import pytest
from two_processes import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("baselines_checks.py", baselines_checks.CHECKS, tmp_path_factory.mktemp("baselines"), timeout=280)


@pytest.mark.parametrize("check", baselines_checks.CHECKS)
def test_two_processes(results, check):
    assert results[check]["error"] is None, results[check]["error"]
