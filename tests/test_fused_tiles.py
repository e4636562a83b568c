"""The search for tile sizes, without a device: what it tries, and what it makes of times."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_ops_triton import needs_interpreter

from examples.benchmarks import fused_tiles
from examples.benchmarks.fused_tiles import SHAPES, TABLES, best_limits, candidates, launch_of, measure, report
from kron_hf.ops.fused import tiles

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FEW = ((64, 4, 3), (64, 8, 2))  # step, warps, stages
SOME = [each for each in candidates("bfloat16", 256) if each.shape in SHAPES[:2] and each.limits[3:] in FEW]


@pytest.fixture
def threads(monkeypatch):
    """In this process, so that what compiles can be replaced."""
    monkeypatch.setattr(fused_tiles, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))


def test_the_present_limits_come_first_and_nothing_twice():
    for dtype, row in (("bfloat16", "half"), ("float32", "float32")):
        found = candidates(dtype, 256)
        assert len(found) == len(set(found))
        for kernel, table in TABLES.items():
            own = [each for each in found if each.kernel == kernel]
            assert own[0].limits == tuple(getattr(tiles, table)[row])
            assert {each.shape for each in own[: len(SHAPES)]} == set(SHAPES)


@needs_triton
@pytest.mark.parametrize("kernel", TABLES)
def test_every_candidate_is_a_launch_of_its_kernel(kernel):
    before = {table: dict(getattr(tiles, table)) for table in TABLES.values()}
    named = {"product": "product_kernel", "transposed": "transposed_product_kernel", "grad_m": "grad_m_kernel"}
    seen = set()
    for each in candidates("bfloat16", 256):
        if each.kernel == kernel:
            made = launch_of(each, "meta")
            assert made.kernel.__name__ == named[kernel]
            assert made.stages == each.limits[5]
            seen.add((made.arguments["TILE_TOKENS"], made.arguments["TILE_OUT"], made.arguments["TILE_IN"], made.warps))
    assert len(seen) > 10
    assert {table: dict(getattr(tiles, table)) for table in TABLES.values()} == before


def test_limits_are_compared_over_all_shapes():
    (one, other), kernel = SHAPES[:2], "grad_m"
    present, faster, broken = (8192, 128, 4, 64, 8, 2), (4096, 64, 4, 64, 4, 1), (4096, 256, 4, 64, 4, 3)

    def candidate(limits, shape):
        return fused_tiles.Candidate(kernel, limits, shape, "bfloat16", 256)

    times = {candidate(faster, one): 1.0, candidate(faster, other): 4.0, candidate(broken, one): 0.1}
    assert best_limits(times, kernel) == []  # the present ones failed
    times |= {candidate(present, one): 2.0, candidate(present, other): 4.0}
    assert best_limits(times, kernel) == [(pytest.approx(0.5**0.5), faster), (1.0, present)]
    assert best_limits(times, "product") == []


INTERPRETED = """
import sys
from examples.benchmarks.fused_tiles import TABLES, Candidate, check, expected_results, launch_of

for kernel in TABLES:
    candidate = Candidate(kernel, (4096, 64, 4, 32, 4, 1), (3, 2, 16, 16, 2), "float32", 21)
    made = launch_of(candidate, "cpu")
    expected = expected_results(candidate, made)
    check(candidate, made, expected)
    for name, value in expected.items():
        try:
            check(candidate, made, {name: value + value.abs().max()})
        except ValueError as error:
            print(kernel, error)
"""


@needs_interpreter
def test_what_each_kernel_computes_is_compared_with_the_dense_formula():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = [line.split(": relative error")[0] for line in done.stdout.splitlines()]
    assert set(found) == {"product v_ptr", "transposed partial_ptr", "transposed grad_x_ptr", "grad_m partial_ptr"}


def test_what_fails_is_counted_and_the_rest_is_reported(threads, monkeypatch):
    def compiled(candidate):
        return "CompilationError: too large" if candidate.kernel == "grad_m" else None

    def timed(candidate):
        if candidate.kernel == "transposed" and candidate.limits[4] == 4:
            raise ValueError("relative error 3.0e-01")
        return 1.0 if candidate.limits[4] == 8 else 2.0

    monkeypatch.setattr(fused_tiles, "compiled", compiled)
    monkeypatch.setattr(fused_tiles, "timed", timed)
    times, failed = measure(SOME, 60, 1)
    assert {each.kernel for each in times} == {"product", "transposed"}
    assert failed.keys() == {"CompilationError: too large", "ValueError: relative error 3.0e-01"}
    assert sum(failed.values()) + len(times) == len(SOME)
    lines = []
    report(times, failed, lines.append)
    assert "  0.500  (8192, 64, 4, 64, 8, 2)\n" in lines
    assert any("present 2.0000 ms, best 1.0000 ms" in line for line in lines)
    assert "x CompilationError: too large" in lines[-1]


def test_it_ends_in_time(threads, monkeypatch):
    monkeypatch.setattr(fused_tiles, "compiled", lambda candidate: None)
    monkeypatch.setattr(fused_tiles, "timed", lambda _: pytest.fail("no time is left"))
    assert measure(SOME, -1, 1) == ({}, {"no time left": 1})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_asks_for_a_device(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused_tiles"])
    assert fused_tiles.main() == 2
    assert "required is a CUDA device" in capsys.readouterr().err
