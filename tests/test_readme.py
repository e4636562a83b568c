"""Every Python snippet of the README runs, in order, in one process and an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import DINOV2_SIZES
from transformers import Dinov2Config, Dinov2Model

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_snippets_run(tmp_path):
    # A small model under the name that the README loads from the Hub: transformers takes a local folder first.
    Dinov2Model(Dinov2Config(**DINOV2_SIZES)).save_pretrained(tmp_path / "facebook" / "dinov2-small")
    script = tmp_path / "snippets.py"
    script.write_text("\n\n".join(SNIPPETS))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize(
    "command",
    [
        'pip install -c constraints.txt -e ".[demo]" && kron-hf demo',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ],
    ids=["demo", "test"],
)
def test_set_up_commands_stand_in_the_readme(command):
    assert command in README


def test_ci_runs_the_test_command_of_the_readme():
    assert (
        'pip install -c constraints.txt -e ".[test]" && pytest'
        in (Path(__file__).parent.parent / ".ci" / "run").read_text()
    )
