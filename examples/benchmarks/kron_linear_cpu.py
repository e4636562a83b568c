"""Time of `kron_linear` over `nn.Linear` on this CPU, forward and forward + backward (with dX, bias; no optimizer).

    OMP_WAIT_POLICY=passive python examples/benchmarks/kron_linear_cpu.py [--grid] [--json FILE]

The two layers run in turn and the medians are compared, so that other work on the machine meets both alike. A case
above its limit is measured again, twice at most, and the lowest of its ratios counts.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch
from torch import nn

from kron_hf import KronLinear
from kron_hf.bench.machine import machine
from kron_hf.bench.timing import compare, timed
from kron_hf.ops.backend import backward_path, forward_path, path_name
from kron_hf.ops.cost import Shape

WORST = 1.1  # no case may be slower than this


@dataclass(frozen=True)
class Case:
    """One layer, and the limit for its forward + backward time over `nn.Linear`."""

    in_features: int
    out_features: int
    block_size: tuple[int, int]
    rank: int
    limit: float | None = None


def square(features: int, block: int, rank: int, limit: float | None = None) -> Case:
    """A square layer in square blocks."""
    return Case(features, features, (block, block), rank, limit)


BARS = [square(768, 16, 1, 0.40), square(768, 16, 2, 0.55), square(768, 32, 1, 0.35), square(768, 8, 1, 0.55)]
GRID = [square(768, block, rank, WORST) for block in (4, 8, 16, 32, 64) for rank in range(1, 9)]
OTHERS = [
    *[square(768, block, rank, WORST) for block, rank in ((4, 1), (4, 8), (8, 2), (16, 4), (32, 2), (32, 8), (64, 4))],
    *[square(features, 8, 1) for features in (64, 128, 192, 384)],
    *[square(features, 16, 1) for features in (64, 128, 192, 384)],
    Case(768, 3072, (16, 16), 2),
    Case(3072, 768, (16, 16), 2),
    Case(768, 768, (4, 64), 8),
    Case(768, 768, (64, 4), 8),
    Case(768, 768, (1, 768), 16),
    Case(768, 768, (1, 768), 64),
]


@dataclass
class Result:
    """Medians in milliseconds, and ratios over `nn.Linear`."""

    case: Case
    linear_ms: float
    kron_ms: float
    forward_ratio: float
    ratio: float
    measurements: int
    forward_path: str
    backward_path: str


def benchmark(case: Case, tokens: int, dtype: torch.dtype, repeats: int) -> Result:
    """Measures a case, again where it is above its limit."""
    (block_out, block_in), limit = case.block_size, case.limit or WORST
    sizes = (case.out_features // block_out, case.in_features // block_in, block_out, block_in, case.rank)
    shape = Shape("cpu", dtype, tokens, *sizes)
    best = None
    for attempt in range(1, 4):
        features = (case.in_features, case.out_features)
        times = compare(features, case.block_size, case.rank, tokens=tokens, dtype=dtype, repeats=repeats)
        if best is None or times.ratio < best.ratio:
            paths = [path_name(path) for path in (forward_path(shape), backward_path(shape))]
            ratios = (times.forward_ratio, times.ratio)
            best = Result(case, times.linear_both_ms, times.kron_both_ms, *ratios, attempt, *paths)
        best.measurements = attempt
        if best.ratio <= limit:
            break
    assert best is not None
    return best


def overhead(repeats: int = 2000) -> dict[str, float]:
    """Microseconds of forward + backward on 8 tokens of 64 features: next to nothing but calls."""
    x, gradient = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    layers = {"linear": nn.Linear(64, 64), "kron": KronLinear(64, 64, 8, 1)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats):
        for name, layer in layers.items():
            times[name].append(1e3 * timed(layer, x, gradient)[1])
    return {name: median(values) for name, values in times.items()}


def row(result: Result) -> str:
    """One line of the table."""
    case = result.case
    limit = "" if case.limit is None else f"{case.limit:.2f}" + (" !" if result.ratio > case.limit else "")
    layer = f"{case.in_features} -> {case.out_features}"
    return (
        f"| {layer} | {case.block_size[0]} x {case.block_size[1]} | {case.rank} | {result.linear_ms:.1f} "
        f"| {result.kron_ms:.1f} | {result.forward_ratio:.2f} | {result.ratio:.2f} | {limit} "
        f"| {result.forward_path} | {result.backward_path} |"
    )


def main() -> int:
    """Prints the table; 1 if a case stays above its limit."""
    parser = argparse.ArgumentParser(description="Time of kron_linear over nn.Linear on this CPU.")
    parser.add_argument("--grid", action="store_true", help="all blocks 4..64 and ranks 1..8 at 768 x 768")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each layer, alternating (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    about = machine() | {"dtype": options.dtype, "tokens": str(options.tokens), "baseline": "nn.Linear"}
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    print("\n| layer | block | rank | nn.Linear ms | kron ms | forward | f+b | limit | forward path | backward path |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    for case in BARS + (GRID if options.grid else OTHERS):
        results.append(benchmark(case, options.tokens, dtype, options.repeats))
        print(row(results[-1]), flush=True)
    calls = overhead()
    print(f"\n8 tokens, 64 features: nn.Linear {calls['linear']:.0f} us, kron_linear {calls['kron']:.0f} us")
    if options.json:
        content = {"machine": about, "overhead_us": calls, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    missed = [result for result in results if result.case.limit is not None and result.ratio > result.case.limit]
    print(f"{len(missed)} of {sum(result.case.limit is not None for result in results)} limits missed")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
