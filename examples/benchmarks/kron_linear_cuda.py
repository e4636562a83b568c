"""Speed of every way to compute `kron_linear` over a dense `F.linear` on a CUDA device, under CUDA graphs.

    python examples/benchmarks/kron_linear_cuda.py [--grid] [--dtype bfloat16] [--tokens 16384] [--json FILE]

Forward, and forward + backward with the gradients of x, all factors and the bias. Each way is captured once as a CUDA
graph; the graphs are replayed in turn, with the L2 cache emptied before each replay, and the medians are compared. Peak
memory is that of one step outside a graph, above what inputs and parameters take.
"""

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_hf.factors import kron_weight
from kron_hf.ops import kron_linear, paths
from kron_hf.ops.ways import Factored, Shape

FUSED = "fused"
Route = Factored | str | None
PATHS: dict[str, Route] = {
    FUSED: FUSED,
    "two_gemms_b_first": Factored("token_last", "b_first", 2**20, 2**20),
    "two_gemms_m_first": Factored("token_last", "m_first", 2**20, 2**20),
    "build_w": None,
}
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # float32 may be TF32
FLUSHED = 2**28  # bytes, more than any L2 cache has


@dataclass(frozen=True)
class Case:
    """One layer; the speed-ups over dense that the fused kernels are to reach, where there are such limits."""

    in_features: int
    out_features: int
    block: int
    rank: int
    forward_bar: float | None = None
    both_bar: float | None = None


BARS = [
    Case(1024, 1024, 16, 1, both_bar=1.5),
    Case(1024, 1024, 16, 2, forward_bar=1.8),
    Case(1024, 4096, 16, 1, forward_bar=2.5),
    Case(4096, 4096, 32, 1, forward_bar=5, both_bar=3),
]
OTHERS = [Case(*sizes, 16, rank) for sizes in ((768, 768), (768, 3072), (3072, 768)) for rank in (1, 2, 4)]
GRID = [Case(d, d, b, r) for d in (384, 768, 1024, 4096) for b in (4, 8, 16, 32, 64) for r in (1, 2, 4, 8)]


@dataclass
class Result:
    """Milliseconds and MiB, by the name of the way; "dense" is the baseline."""

    case: Case
    forward_ms: dict[str, float]
    both_ms: dict[str, float]
    peak_mib: dict[str, float]

    def speed_up(self, name: str, both: bool) -> float:
        """Of a way over dense."""
        times = self.both_ms if both else self.forward_ms
        return times["dense"] / times[name]

    def missed(self) -> int:
        """How many bars the fused kernels missed."""
        bars = ((self.case.forward_bar, False), (self.case.both_bar, True))
        return sum(bar is not None and self.speed_up("fused", both) < bar for bar, both in bars)


@contextmanager
def forced(path: Route) -> Iterator[None]:
    """Makes both directions take one path; a fallback from the kernels is an error."""

    def choose(shape: Shape) -> Factored | None:
        if isinstance(path, str):
            raise RuntimeError(f"the fused kernels did not run for {shape}")
        return path

    choice = {"forward_path": choose, "backward_path": choose, "fused_first": lambda shape: path == FUSED}
    with patch.multiple(paths, **choice), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def ways(case: Case, tokens: int, dtype: torch.dtype) -> dict[str, tuple[Route, Callable[[], Tensor], list[Tensor]]]:
    """Path, forward, and the leaves of each way; all compute the same layer."""
    block, out_blocks, in_blocks = case.block, case.out_features // case.block, case.in_features // case.block
    options = {"device": "cuda", "dtype": dtype}
    x = torch.randn(tokens, case.in_features, **options).requires_grad_()
    s = torch.ones(out_blocks, in_blocks, **options).requires_grad_()
    a = (torch.randn(case.rank, out_blocks, in_blocks, **options) / in_blocks**0.5).requires_grad_()
    b = (torch.randn(case.rank, block, block, **options) / (case.rank * block) ** 0.5).requires_grad_()
    bias = torch.randn(case.out_features, **options).requires_grad_()
    weight = kron_weight(s, a, b).detach().requires_grad_()
    found = {"dense": (None, lambda: F.linear(x, weight, bias), [x, weight, bias])}
    for name, path in PATHS.items():
        found[name] = (path, lambda: kron_linear(x, s, a, b, bias), [x, s, a, b, bias])
    return found


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as a CUDA graph, after three runs that compile and tune."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def replay_times(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, float]:
    """Median milliseconds of a replay, the graphs in turn."""
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 3):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:  # the first ones only warm up
                times[name].append(start.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}


def peak_mib(step: Callable[[], object]) -> float:
    """Memory that one step takes beyond what is held already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def benchmark(case: Case, tokens: int, dtype: torch.dtype, repeats: int) -> Result:
    """Checks that all ways agree, then measures them."""
    gradient = torch.randn(tokens, case.out_features, device="cuda", dtype=dtype)
    forwards, boths, peaks, outputs = {}, {}, {}, {}
    for name, (path, forward, leaves) in ways(case, tokens, dtype).items():

        def both(forward: Callable[[], Tensor] = forward, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(forward(), leaves, gradient)

        with forced(path):
            outputs[name] = forward().detach()
            both()
            peaks[name] = peak_mib(both)
            forwards[name], boths[name] = captured(forward), captured(both)
    scale = outputs["dense"].abs().max()
    for name, output in outputs.items():
        error = ((output - outputs["dense"]).abs().max() / scale).item()
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"{name} is wrong for {case}: relative error {error:.1e}")
    return Result(case, replay_times(forwards, repeats), replay_times(boths, repeats), peaks)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
    }


def row(result: Result) -> str:
    """One line of the table: speed-ups forward / forward + backward, peak memory over dense."""
    case = result.case
    cells = [f"{case.in_features} -> {case.out_features}", str(case.block), str(case.rank)]
    cells += [f"{result.forward_ms['dense']:.3f} / {result.both_ms['dense']:.3f}"]
    cells += [f"{result.speed_up(name, both=False):.2f} / {result.speed_up(name, both=True):.2f}" for name in PATHS]
    cells += [f"{result.peak_mib['fused'] / result.peak_mib['dense']:.2f}"]
    cells += [f"{case.forward_bar or '-'} / {case.both_bar or '-'}" + " !" * bool(result.missed())]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Prints the table; 1 if a bar is missed, 2 without a device."""
    parser = argparse.ArgumentParser(description="Speed of kron_linear over F.linear on a CUDA device.")
    parser.add_argument("--grid", action="store_true", help="d 384..4096, blocks 4..64, ranks 1..8")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="let float32 products use TF32, dense ones too")
    parser.add_argument("--repeats", type=int, default=50, help="replays of each graph, alternating (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("kron_linear_cuda: required is a CUDA device; torch sees none", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.manual_seed(0)
    about = machine() | {"dtype": options.dtype, "tf32": str(options.tf32), "tokens": str(options.tokens)}
    about |= {"repeats": str(options.repeats), "baseline": "F.linear (cuBLAS), CUDA graphs"}
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    print(f"\n| layer | block | rank | dense ms | {' | '.join(PATHS)} | memory | bars |")
    print("|---" * (6 + len(PATHS)) + "|", flush=True)
    results = []
    for case in BARS + (GRID if options.grid else OTHERS):
        results.append(benchmark(case, options.tokens, getattr(torch, options.dtype), options.repeats))
        print(row(results[-1]), flush=True)
    if options.json:
        content = {"machine": about, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    missed = sum(result.missed() for result in results)
    print(f"\n{missed} of 5 bars missed (they are for bfloat16, 16384 tokens and a device of the H200's class)")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
