"""Thousands of damaged and malicious checkpoints: each loads as it is, or is refused with a clean error.

`cd tests && python fuzz_worker.py checkpoint SEED 1` repeats the input of one seed; `selection` in the place of
`checkpoint` is one saved while block sizes are being selected.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fuzz_adapters import ADAPTER_KINDS
from fuzz_checkpoints import KINDS

TESTS = Path(__file__).parent
# What one input may add to the memory of a process: 2**26 elements are the bound on what is allocated, a header of
# megabytes is parsed several times.
GROWTH_MB = 500
WAYS = ("by_from_pretrained", "by_summary", "by_get_kron_model", "by_peft")


def fuzzed(door: str, first: int, count: int) -> tuple[list[dict[str, Any]], str]:
    """The results of some seeds, from two processes, and what these wrote to stderr."""
    share, results, rest = count // 2, [], ""
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        workers = [
            subprocess.Popen(
                [sys.executable, "fuzz_worker.py", door, str(first + share * index), str(share)],
                **{"cwd": TESTS, "stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT},
            )
            for index, output in enumerate(outputs)
        ]
        for worker, output in zip(workers, outputs, strict=True):
            status = worker.wait()
            output.seek(0)
            lines = output.readlines()
            results += [json.loads(line) for line in lines if line.startswith('{"seed"')]
            rest += "".join(line for line in lines if not line.startswith(('{"seed"', "# seed")))
            assert status == 0, f"died with {status} at the last seed of: {''.join(lines[-20:])}"
    return results, rest


def check(door: str, first: int, count: int, figures: Callable[[str], None]) -> dict[str, Counter]:
    """Fuzzes, counts and checks what holds for every input; returns the outcomes by way of loading."""
    results, rest = fuzzed(door, first, count)
    assert len(results) == count
    bad = [result for result in results if result["bad"]]
    assert not bad, json.dumps(bad[:5], indent=1)
    unprintable = [line for line in rest.split("\n") if not line.replace("\t", "").isprintable()]
    assert not unprintable
    assert max(result["grown_mb"] for result in results) < GROWTH_MB
    kinds = Counter(result["kind"] for result in results)
    assert kinds.keys() == (ADAPTER_KINDS if door == "adapter" else KINDS).keys()
    ways = {key: Counter(result[key] for result in results if key in result) for key in WAYS}
    outcomes = [f"{way} {dict(counts)}" for way, counts in ways.items() if counts]
    peak, grown = (max(result[key] for result in results) for key in ("peak_mb", "grown_mb"))
    figures(
        f"{count} inputs of {len(kinds)} kinds; {'; '.join(outcomes)}; peak {peak} MB, one input at most {grown} MB"
    )
    return ways


def check_checkpoints(first: int, count: int, figures: Callable[[str], None], door: str = "checkpoint") -> None:
    ways = check(door, first, count, figures)
    plain, summary = ways["by_from_pretrained"], ways["by_summary"]
    assert min(plain["loaded"], plain["refused ValueError"], summary["loaded"], summary["refused"]) > count // 40


def check_adapters(first: int, count: int, figures: Callable[[str], None]) -> None:
    outcomes = check("adapter", first, count, figures)["by_peft"]
    assert min(outcomes["loaded"], outcomes["refused ValueError"]) > count // 20


def test_damaged_checkpoints(figures):
    check_checkpoints(0, 80, figures)


@pytest.mark.slow
def test_damaged_checkpoints_in_selection(figures):
    check_checkpoints(0, 76, figures, "selection")


@pytest.mark.slow
def test_damaged_adapters(figures):
    check_adapters(0, 40, figures)


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints(figures):
    check_checkpoints(10_000, 7000, figures)


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints_in_selection(figures):
    check_checkpoints(10_000, 1000, figures, "selection")


@pytest.mark.slow
def test_thousands_of_damaged_adapters(figures):
    check_adapters(10_000, 2000, figures)
