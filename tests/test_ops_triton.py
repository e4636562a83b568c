"""The fused kernels: interpreted on the CPU, compiled for GPUs that are not there, natively where there is one.

What is checked stands in fused_checks.py. The interpreter is chosen when Triton is imported, so in an own process.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import warnings
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from test_ops import SQUARE, make_inputs, naive, output_and_gradients

from kron_hf.ops import cost, fused, kron_linear, paths

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed (it is for Linux only)")
needs_interpreter = pytest.mark.skipif(
    not TRITON or Version(version("triton")) < Version("3.7"),
    reason="the interpreter before Triton 3.7 converts arrays as numpy no longer allows",
)
if TRITON:
    import ahead_of_time
    import fused_checks
CORE, MORE, NATIVE = (
    (list(fused_checks.CORE), list(fused_checks.MORE), list(fused_checks.NATIVE)) if TRITON else ([], [], [])
)
# (O, I, bo, bi, rank)
SHIPPED = {
    f"{features}_{block}x{block}_rank_{rank}": (features // block, features // block, block, block, rank)
    for features, block, rank in (
        *((768, block, rank) for block in (4, 8, 16, 32, 64) for rank in (1, 2, 16)),
        *((1024, 16, 1), (1024, 16, 4), (4096, 32, 1), (4096, 32, 8)),
    )
}
SHIPPED |= {"768_4x64_rank_8": (192, 12, 4, 64, 8), "768_64x4_rank_8": (12, 192, 64, 4, 8)}
SHIPPED |= {"1024_to_4096": (256, 64, 16, 16, 1), "not_powers_of_two": (48, 36, 16, 12, 3)}
SHARED_LIMIT = 99 * 1024  # bytes a program on the smallest of capability 8.0 and more


def interpreted(names, folder):
    """Results of the named checks by name."""
    file = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).parent / "fused_checks.py"), str(file), *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return interpreted(CORE, tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return interpreted(MORE, tmp_path_factory.mktemp("more"))


@needs_interpreter
@pytest.mark.parametrize("check", CORE)
def test_in_the_interpreter(core, check):
    assert core[check] is None, core[check]


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("check", MORE)
def test_more_in_the_interpreter(more, check):
    assert more[check] is None, more[check]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CORE + MORE + NATIVE)
def test_on_the_device(check):
    (fused_checks.CORE | fused_checks.MORE | fused_checks.NATIVE)[check]("cuda")


def assert_fits(shape, dtype, capability):
    for made in ahead_of_time.launches(shape, dtype):
        found = ahead_of_time.resources(made, capability)
        assert found.spilled == 0, (made, found)
        assert found.shared <= SHARED_LIMIT, (made, found)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [
        ("1024_16x16_rank_1", torch.bfloat16, 90),
        ("768_32x32_rank_2", torch.float16, 80),
    ],
    ids=str,
)
def test_compiled_without_spills(own_cache, name, dtype, capability):
    assert_fits(SHIPPED[name], dtype, capability)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "capability"),
    list(product(SHIPPED, ["bfloat16", "tf32", "float32"], [80, 90])),
)
def test_all_compiled_without_spills(own_cache, restored_tf32, name, precision, capability):
    torch.backends.cuda.matmul.allow_tf32 = tf32 = precision == "tf32"
    assert_fits(SHIPPED[name], torch.float32 if tf32 else getattr(torch, precision), capability)


@needs_triton
def test_a_spill_is_seen(own_cache):
    """A tile that one warp cannot hold: the search for spills does find some."""
    made = ahead_of_time.launches((64, 64, 16, 16, 1), torch.bfloat16)[0]
    crowded = made._replace(warps=1)
    assert ahead_of_time.resources(crowded, 80).spilled > 0


@pytest.fixture
def forced(monkeypatch):
    """The fused path on the CPU, as if it could run there."""
    monkeypatch.setattr(paths, "fused_first", lambda shape: True)
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    monkeypatch.setitem(fused._state, "broken", False)


def break_launch(monkeypatch, module):
    """Makes `from kron_hf.ops.fused import launch` give module; None makes it fail as a missing triton does."""
    monkeypatch.setitem(sys.modules, "kron_hf.ops.fused.launch", module)
    if module is None:
        monkeypatch.delattr(fused, "launch", raising=False)
    else:
        monkeypatch.setattr(fused, "launch", module, raising=False)


class Broken:
    """A module whose kernels fail."""

    def __init__(self, error):
        self.error = error

    def product(self, *_):
        raise self.error


@pytest.mark.parametrize("module", [None, Broken(RuntimeError("Failed to find C compiler\nat"))], ids=["no", "broken"])
def test_a_missing_or_broken_triton_warns_once_and_falls_back(monkeypatch, forced, module):
    break_launch(monkeypatch, module)
    inputs = make_inputs(SQUARE, 5, torch.float32)
    reason = "ModuleNotFoundError" if module is None else r"RuntimeError: Failed to find C compiler\)"
    with pytest.warns(RuntimeWarning, match=rf"do not run here \(.*{reason}.*pip install triton") as caught:
        out = kron_linear(*inputs)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(output_and_gradients(kron_linear, inputs), output_and_gradients(naive, inputs))
    torch.testing.assert_close(out, naive(*inputs))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("lost")], ids=str)
def test_errors_of_the_device_are_not_hidden(monkeypatch, forced, error):
    break_launch(monkeypatch, Broken(error))
    with pytest.raises(type(error)):
        kron_linear(*make_inputs(SQUARE, 5, torch.float32))
    assert not fused._state["broken"]


CUDA = cost.Shape("cuda", torch.bfloat16, 16384, 64, 64, 16, 16, 1)
UNSUPPORTED = {
    "float64": {"dtype": torch.float64},
    "block_2": {"block_in": 2},
    "block_128": {"block_out": 128},
    "rank_17": {"rank": 17},
    "no_token": {"tokens": 0},
    "2_to_31_tokens": {"tokens": 2**31},
    "2_to_31_features_a_tile": {"in_blocks": 2**22},
    "2_to_31_entries_of_m": {"out_blocks": 2**16, "in_blocks": 2**15},
}


@pytest.mark.parametrize("changes", UNSUPPORTED.values(), ids=list(UNSUPPORTED))
def test_what_the_kernels_do_not_support(forced, changes):
    assert fused.supports(CUDA)
    assert not fused.supports(CUDA._replace(**changes))
    inputs = make_inputs(SQUARE, 5)  # float64: another path computes, without a warning
    torch.testing.assert_close(kron_linear(*inputs), naive(*inputs))


WINS = {  # changes of 1024 x 1024, 16 x 16, rank 1, bfloat16, 16384 tokens
    "as_is": ({}, True),
    "float16": ({"dtype": torch.float16}, True),
    "32x32_rank_8": ({"out_blocks": 32, "in_blocks": 32, "block_out": 32, "block_in": 32, "rank": 8}, True),
    "768_to_3072": ({"out_blocks": 192, "in_blocks": 48}, True),
    "float32": ({"dtype": torch.float32}, False),
    "cpu": ({"device_type": "cpu"}, False),
    "few_tokens": ({"tokens": 4096}, False),
    "small": ({"out_blocks": 32, "in_blocks": 32}, False),
    "rank_5": ({"rank": 5}, False),
    "8x8": ({"block_out": 8, "block_in": 8}, False),
    "64x64": ({"block_out": 64, "block_in": 64}, False),
}


@pytest.mark.parametrize(("changes", "wins"), WINS.values(), ids=list(WINS))
def test_where_the_cost_model_takes_the_kernels(changes, wins):
    assert cost.fused_wins(CUDA._replace(**changes)) == wins


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_asks_for_a_device(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kron_linear_cuda.py"])
    benchmark = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "benchmarks" / "kron_linear_cuda.py"))
    assert benchmark["main"]() == 2
    assert "required is a CUDA device" in capsys.readouterr().err


def test_importing_the_operator_imports_no_kernel():
    code = "import sys, kron_hf; print([name for name in sys.modules if name.startswith('kron_hf.ops.fused.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
