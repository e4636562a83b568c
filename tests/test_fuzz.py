"""Thousands of damaged and malicious checkpoints: each loads as it is, or is refused with a clean error.

The inputs are made by `fuzz_checkpoints.py` from a seed; `cd tests && python fuzz_worker.py SEED 1` repeats one.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_checkpoints import KINDS

TESTS = Path(__file__).parent
# What one input may add to the memory of a process: 2**26 elements are the bound on what is allocated, a header of
# megabytes is parsed several times.
GROWTH_MB = 500


def fuzzed(first: int, count: int) -> tuple[list[dict[str, Any]], str]:
    """The results of some seeds, from two processes, and what these wrote to stderr."""
    share = count // 2
    workers = [
        subprocess.Popen(
            [sys.executable, "fuzz_worker.py", str(start), str(share)],
            **{"cwd": TESTS, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
            text=True,
        )
        for start in (first, first + share)
    ]
    results, rest = [], ""
    for worker in workers:
        output = worker.communicate()[0]
        lines = output.splitlines(keepends=True)
        results += [json.loads(line) for line in lines if line.startswith('{"seed"')]
        rest += "".join(line for line in lines if not line.startswith(('{"seed"', "# seed")))
        assert worker.returncode == 0, f"died with {worker.returncode} at the last seed of: {output[-2000:]}"
    return results, rest


def check(results: list[dict[str, Any]], rest: str, count: int) -> None:
    assert len(results) == count
    bad = [result for result in results if result["bad"]]
    assert not bad, json.dumps(bad[:5], indent=1)
    unprintable = [line for line in rest.split("\n") if not line.replace("\t", "").isprintable()]
    assert not unprintable
    assert max(result["grown_mb"] for result in results) < GROWTH_MB
    counts = Counter(result["kind"] for result in results)
    assert counts.keys() == KINDS.keys()
    plain = Counter(result["by_from_pretrained"] for result in results)
    summary = Counter(result["by_summary"] for result in results if "by_summary" in result)
    assert min(plain["loaded"], plain["refused ValueError"], summary["loaded"], summary["refused"]) > count // 40
    print("inputs", count, *(f"\n  {kind}: {number}" for kind, number in sorted(counts.items())))  # noqa: T201
    for door in ("by_from_pretrained", "by_summary", "by_get_kron_model"):
        print(door, Counter(result[door] for result in results if door in result))  # noqa: T201
    print("peak of a process, MB:", max(result["peak_mb"] for result in results))  # noqa: T201


def test_damaged_checkpoints():
    check(*fuzzed(0, 300), 300)


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints():
    check(*fuzzed(10_000, 8000), 8000)
