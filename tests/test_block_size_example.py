"""The experiment on block-size selection, cut down."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "experiments" / "block_size.py"


@pytest.mark.slow
def test_runs_skips_what_is_done_and_prints_tables(tmp_path):
    output, picture = tmp_path / "results" / "runs.jsonl", tmp_path / "norms.png"
    arguments = ["fashion", "--dataset", "digits", "--steps", "20", "--output", output, "--picture", picture]
    tables = []
    for _ in range(2):
        done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
    assert tables[0] == tables[1]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    runs = Counter(row["run"] for row in rows)
    assert set(runs.values()) == {3}
    assert all((row["chosen"] is None) == (row["mode"] is None) for row in rows)
    assert all(name in tables[0] for name in runs)
    assert "training each alone picks" in tables[0]
    assert picture.read_bytes().startswith(b"\x89PNG")
