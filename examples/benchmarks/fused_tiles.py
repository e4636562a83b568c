"""Tile sizes of the fused kernels on a CUDA device: many are compiled side by side and timed, the best are printed.

    python -m examples.benchmarks.fused_tiles [--dtype bfloat16] [--tokens 16384] [--minutes 8] [--json FILE]

What is printed is what `kron_hf/ops/fused/tiles.py` would say: limits hold for all shapes, so they are compared by the
geometric mean over the shapes of their time over that of the limits that stand there. What each computes is compared
with the dense formula in float32 first. What the time does not suffice for is left out, and the output says so.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kron_hf.bench.machine import machine
from kron_hf.ops.dense_weight import build_weight, factor_gradients
from kron_hf.ops.fused import tiles

__all__ = ["Candidate", "best_limits", "candidates", "check", "expected_results", "launch_of", "main", "timed"]

TABLES = {"product": "_PRODUCT", "transposed": "_TRANSPOSED", "grad_m": "_GRAD_M"}
# (O, I, bo, bi, rank): of the bars, and of ViT-B/16
SHAPES = [
    *((64, 64, 16, 16, 1), (64, 64, 16, 16, 2), (256, 64, 16, 16, 1), (128, 128, 32, 32, 1)),
    *((48, 48, 16, 16, 2), (192, 48, 16, 16, 2), (48, 192, 16, 16, 2)),
]
ENTRIES, COLUMNS, STEPS, WARPS, STAGES = (4096, 8192), (64, 128, 256), (32, 64), (4, 8), (1, 2, 3)
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest entry; maybe TF32


class Candidate(NamedTuple):
    """Limits of one kernel, for one shape."""

    kernel: str
    limits: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    tokens: int


def candidates(dtype: str, tokens: int) -> list[Candidate]:
    """All of them; for each kernel and shape the present limits first."""
    found = []
    for kernel in TABLES:
        present = _present(kernel, dtype)
        others = product(ENTRIES, COLUMNS, (present[2],), STEPS, WARPS, STAGES)
        for limits in dict.fromkeys([present, *others]):
            found += [Candidate(kernel, limits, shape, dtype, tokens) for shape in SHAPES]
    return found


@contextmanager
def _limited(candidate: Candidate) -> Iterator[None]:
    row = tiles.precision(getattr(torch, candidate.dtype))
    table = getattr(tiles, TABLES[candidate.kernel])
    with patch.dict(table, {row: type(table[row])(*candidate.limits)}):
        yield


def launch_of(candidate: Candidate, device: str) -> Any:
    """The launch of its kernel, with tensors of its own."""
    from kron_hf.ops.fused import launch

    out_blocks, in_blocks, block_out, block_in, rank = candidate.shape
    torch.manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=getattr(torch, candidate.dtype), device=device)

    x, y = random(candidate.tokens, in_blocks * block_in), random(candidate.tokens, out_blocks * block_out)
    m, b = random(rank, out_blocks, in_blocks), random(rank, block_out, block_in)
    with _limited(candidate):
        if candidate.kernel == "product":
            return launch.product_launch(x, m, b, random(out_blocks * block_out), torch.empty_like(y))
        grad_m, transposed, *_ = launch.gradients_launches(y, x, m, b, torch.empty_like(x))[0]
        return grad_m if candidate.kernel == "grad_m" else transposed


def compiled(candidate: Candidate) -> str | None:
    """Compiles it into Triton's cache on the disk; the error if that fails."""
    try:
        made = launch_of(candidate, "meta")  # the device shall do nothing but what is timed
        options = {"num_warps": made.warps, "num_stages": made.stages}
        made.kernel.warmup(**made.arguments, **options, grid=made.grid)
    except Exception as error:  # whatever a compiler may say of a tile
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def expected_results(candidate: Candidate, made: Any) -> dict[str, Tensor]:
    """What its launch has to write, by the name of the argument, partial sums added up: in float32, by the dense W."""
    wide = {name: value.float() for name, value in made.arguments.items() if isinstance(value, Tensor)}
    if candidate.kernel == "product":
        return {"v_ptr": F.linear(wide["u_ptr"], build_weight(wide["m_ptr"], wide["b_ptr"]), wide["bias_ptr"])}
    out_blocks, in_blocks, _, _, rank = candidate.shape
    grad_w = wide["g_ptr"].T @ wide["x_ptr"]
    if candidate.kernel == "grad_m":
        m = grad_w.new_empty(rank, out_blocks, in_blocks)  # dM does not depend on it
        return {"partial_ptr": factor_gradients(grad_w, m, wide["b_ptr"])[0]}
    m, b = wide["m_ptr"], wide["b_ptr"]
    expected = {"partial_ptr": factor_gradients(grad_w, m, b)[1]}
    if made.arguments["WRITE_GRAD_X"]:
        expected["grad_x_ptr"] = wide["g_ptr"] @ build_weight(m, b)
    return expected


def check(candidate: Candidate, made: Any, expected: dict[str, Tensor]) -> None:
    """Runs a launch and compares.

    Raises:
        ValueError: It computes something else.
    """
    for name in expected:
        made.arguments[name].fill_(float("nan"))  # what is not written must not pass
    made.run()
    for name, value in expected.items():
        found = made.arguments[name].sum(0) if name == "partial_ptr" else made.arguments[name]
        error = ((found - value).abs().max() / value.abs().max()).item()
        if not error < TOLERANCE[getattr(torch, candidate.dtype)]:
            raise ValueError(f"{name}: relative error {error:.1e}")


def timed(candidate: Candidate) -> float:
    """Median milliseconds.

    Raises:
        ValueError: It computes something else.
    """
    from triton.testing import do_bench

    made = launch_of(candidate, "cuda")
    check(candidate, made, expected_results(candidate, made))
    return cast(float, do_bench(made.run, warmup=5, rep=20, return_mode="median"))


def _present(kernel: str, dtype: str) -> tuple[int, ...]:
    return tuple(getattr(tiles, TABLES[kernel])[tiles.precision(getattr(torch, dtype))])


def best_limits(times: dict[Candidate, float], kernel: str) -> list[tuple[float, tuple[int, ...]]]:
    """Geometric mean of the time over that of the present limits, and the limits, best first.

    Those of which a shape is missing, of all that the present ones have, are left out.
    """
    by_limits: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    present: dict[tuple[int, ...], float] = {}
    for candidate, milliseconds in times.items():
        if candidate.kernel == kernel:
            by_limits.setdefault(candidate.limits, {})[candidate.shape] = milliseconds
            present = by_limits.get(_present(kernel, candidate.dtype), {})
    if not present:
        return []
    whole = {limits: found for limits, found in by_limits.items() if found.keys() == present.keys()}
    means = {
        limits: geometric_mean(found[shape] / present[shape] for shape in present) for limits, found in whole.items()
    }
    return sorted((mean, limits) for limits, mean in means.items())


def measure(every: list[Candidate], seconds: float, workers: int) -> tuple[dict[Candidate, float], dict[str, int]]:
    """Times by candidate, and how many failed, by what went wrong."""
    end, times, failed = time.monotonic() + seconds, {}, {}

    def fail(reason: str) -> None:
        failed[reason] = failed.get(reason, 0) + 1

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = pool.map(compiled, every)
        for candidate, error in tqdm(zip(every, jobs, strict=True), total=len(every), unit="kernel"):
            if time.monotonic() > end:
                pool.shutdown(wait=False, cancel_futures=True)
                fail("no time left")
                break
            if error is not None:
                fail(error)
                continue
            try:
                times[candidate] = timed(candidate)
            except torch.AcceleratorError:
                raise  # nothing runs after it
            except (RuntimeError, ValueError) as problem:
                fail(f"{type(problem).__name__}: {problem}".splitlines()[0][:200])
            except Exception as problem:  # Triton's OutOfResources derives from its own error
                if "OutOfResources" not in type(problem).__name__:
                    raise
                fail("OutOfResources")
    return times, failed


def report(times: dict[Candidate, float], failed: dict[str, int], write: Callable[[str], Any]) -> None:
    """The best limits of each kernel, and its best times by shape."""
    names = ", ".join(tiles._Limits._fields)
    for kernel in TABLES:
        write(f"\n{kernel}: time over that of the present limits; limits are {names}\n")
        for mean, limits in best_limits(times, kernel)[:6]:
            write(f"  {mean:.3f}  {limits}\n")
        for shape in SHAPES:
            own = {each: ms for each, ms in times.items() if (each.kernel, each.shape) == (kernel, shape)}
            if own:
                present = [ms for each, ms in own.items() if each.limits == _present(kernel, each.dtype)]
                best = min(own, key=lambda each: own[each])
                before = f"{present[0]:.4f} ms" if present else "failed"
                write(f"  {shape}: present {before}, best {own[best]:.4f} ms with {best.limits}\n")
    write("".join(f"\n{count} x {reason}" for reason, count in failed.items()) + "\n")


def main() -> int:
    """The command; 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("fused_tiles: required is a CUDA device; torch sees none\n")
        return 2
    about = machine("cuda")
    sys.stdout.write(f"{about}, {options.dtype}, {options.tokens} tokens\n")
    times, failed = measure(candidates(options.dtype, options.tokens), 60 * options.minutes, options.workers)
    report(times, failed, sys.stdout.write)
    if options.json:
        rows = [each._asdict() | {"ms": milliseconds} for each, milliseconds in times.items()]
        options.json.write_text(json.dumps({"machine": about, "times": rows, "failed": failed}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
