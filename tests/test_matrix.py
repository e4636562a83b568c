"""The tests that lean on other libraries, with the lowest and the newest supported versions of these."""

import os
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

ROOT = Path(__file__).parent.parent


def run_matrix(*arguments):
    command = [sys.executable, str(ROOT / "tests" / "matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_list_names_the_sets_and_the_tests():
    done = run_matrix("--list")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["lowest", "newest", "tests"]
    assert f"transformers {matrix.pinned('lowest')['transformers']}" in lines[0]
    assert lines[3:] == matrix.TESTS
    assert all((ROOT / path).is_file() for path in matrix.TESTS)


def test_an_unknown_set_is_refused():
    done = run_matrix("oldest")
    assert done.returncode == 2
    assert "no set 'oldest'; there are lowest, newest" in done.stderr


def test_table():
    rows = [
        matrix.Row("lowest", {"peft": "0.20.0"}, 0, "9 passed", 61.4),
        matrix.Row("newest", {"peft": "1"}, 1, "", 2),
    ]
    header, lowest, newest = matrix.table(rows).splitlines()
    assert header.split() == ["set", "torch", "peft", "tests", "seconds"]
    assert lowest.split()[2:] == ["0.20.0", "9", "passed", "61"]
    assert newest.split()[2:] == ["1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(matrix.PINS))
def test_supported_versions(name, figures):
    done = run_matrix(name)
    if done.returncode == matrix.NOT_INSTALLED and "CI" not in os.environ:
        pytest.skip(f"pip could not install the versions: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout[-5000:]
    figures(" ".join(done.stdout.splitlines()[-1].split()))
