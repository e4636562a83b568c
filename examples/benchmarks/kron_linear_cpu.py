"""Time of `kron_linear` over `nn.Linear` on this CPU, forward and forward + backward (with dX, bias; no optimizer).

    OMP_WAIT_POLICY=passive python examples/benchmarks/kron_linear_cpu.py [--grid] [--json FILE]

The two layers run in turn and the medians are compared, so that other work on the machine meets both alike. A case
above its limit is measured again, twice at most, and the lowest of its ratios counts.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch
from torch import nn

from kron_hf import KronLinear
from kron_hf.ops.cost import Shape, backward_path, forward_path

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


def timed(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of one forward, and of forward + backward."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    out = layer(x)
    middle = time.perf_counter()
    out.backward(gradient)
    end = time.perf_counter()
    return 1e3 * (middle - start), 1e3 * (end - start)


def measure(case: Case, tokens: int, dtype: torch.dtype, repeats: int) -> tuple[float, float, float, float]:
    """Median milliseconds: forward and forward + backward of `nn.Linear`, then of the Kronecker layer."""
    linear = nn.Linear(case.in_features, case.out_features, dtype=dtype)
    kron = KronLinear(case.in_features, case.out_features, case.block_size, case.rank, dtype=dtype)
    x = torch.randn(tokens, case.in_features, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, case.out_features, dtype=dtype)
    runs: tuple[list[tuple[float, float]], ...] = ([], [])
    for repeat in range(repeats + 1):
        for layer, results in zip((linear, kron), runs, strict=True):
            milliseconds = timed(layer, x, gradient)
            if repeat:  # the first run only warms up
                results.append(milliseconds)
    (linear_forward, linear_both), (kron_forward, kron_both) = (
        [median(column) for column in zip(*results, strict=True)] for results in runs
    )
    return linear_forward, linear_both, kron_forward, kron_both


def benchmark(case: Case, tokens: int, dtype: torch.dtype, repeats: int) -> Result:
    """Measures a case, again where it is above its limit."""
    (block_out, block_in), limit = case.block_size, case.limit or WORST
    sizes = (case.out_features // block_out, case.in_features // block_in, block_out, block_in, case.rank)
    shape = Shape("cpu", dtype, tokens, *sizes)
    best = None
    for attempt in range(1, 4):
        linear_forward, linear_both, kron_forward, kron_both = measure(case, tokens, dtype, repeats)
        ratio = kron_both / linear_both
        if best is None or ratio < best.ratio:
            paths = [
                "build W" if path is None else f"{path.layout}, {path.order}, {path.chunk}"
                for path in (forward_path(shape), backward_path(shape))
            ]
            best = Result(case, linear_both, kron_both, kron_forward / linear_forward, ratio, attempt, *paths)
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


def machine() -> dict[str, str]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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
