"""Measures the cases of a suite that the file of results lacks. Interrupted, it goes on where it was.

OMP_WAIT_POLICY=passive python -m examples.benchmarks.run bars
python -m examples.benchmarks.run models --device cuda --dtype bfloat16 --batch 64
python -m examples.benchmarks.report

Each method runs in turn with the dense layer or model, and medians are compared. A case above its limit is measured
again, twice at most, and the lowest of its ratios counts.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: waiting threads that spin disturb what is measured, and the profiler talks.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from tqdm.auto import tqdm

from examples.benchmarks.cases import Case, Conditions, key_of, to_row
from examples.benchmarks.measuring import Measured, alternate, forward_flops, memory, roof
from examples.benchmarks.methods import METHODS
from examples.benchmarks.registry import GRID, SUITES, WORST, limit
from examples.benchmarks.subjects import build_subject
from kron_hf.bench.machine import machine

__all__ = ["RESULTS", "complete", "main", "measure", "read_rows"]

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks.jsonl"
ATTEMPTS = 3


def measure(case: Case, conditions: Conditions, repeats: int) -> dict[str, Any]:
    """The row of a case: what `measuring` finds, with `dense_` before that of the dense layer or model."""
    method = METHODS[case.method]
    with warnings.catch_warnings(), method.forcing():
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="These modules need as many FLOPs as dense ones")
        warnings.filterwarnings("ignore", message="'use_mkldnn_matmul'|Profiler|.*profil.*", category=UserWarning)
        dense, own = build_subject(case, conditions), build_subject(case, conditions)
        model = method.build(own.model, case, own.modules)
        trained = not method.forward_only
        runs = {"dense_": Measured.of(dense.model, dense, trained=trained)}
        runs[""] = Measured.of(model, own, trained=trained)
        row: dict[str, Any] = to_row(case, conditions)
        bound = limit(case, conditions) or (WORST if case in GRID else None)
        for attempt in range(1, ATTEMPTS + 1):
            times = alternate(runs, repeats)
            found = {f"{name}{what}": value for name, values in times.items() for what, value in values.items()}
            if attempt == 1 or _ratio(found, case) < _ratio(row, case):
                row |= found
            row["attempts"] = attempt
            if bound is None or _ratio(row, case) <= bound:
                break
        for name, measured in runs.items():
            row |= {f"{name}{what}": value for what, value in memory(measured, hooks=not method.compiled).items()}
            parameters = [each for each in measured.model.parameters() if each.requires_grad]
            row[f"{name}trained_params"] = sum(each.numel() for each in parameters)
        if case.features and not method.compiled:
            row["forward_flops"], row["dense_forward_flops"] = (forward_flops(runs[name]) for name in ("", "dense_"))
        return row


def _ratio(row: dict[str, Any], case: Case) -> float:
    """What limits are for: forward + backward of a layer, a whole step of a model."""
    what = "both_ms" if case.features else "step_ms"
    return row.get(what, row["forward_ms"]) / row.get(f"dense_{what}", row["dense_forward_ms"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def complete(cases: Sequence[Case], conditions: Conditions, repeats: int, path: Path) -> list[dict[str, Any]]:
    """Measures what is missing; returns the rows of all cases that can run here. One that fails has an `error`."""
    done = {_row_key(row): row for row in read_rows(path) if "roof" not in row}
    here = [case for case in cases if METHODS[case.method].device in (None, conditions.device)]
    missing = [case for case in here if key_of(case, conditions) not in done]
    if missing and not any(_same_machine(row, conditions) for row in read_rows(path) if "roof" in row):
        found = roof(conditions.device, getattr(torch, conditions.dtype))
        _append(path, {"roof": found, **vars(conditions), "about": machine(conditions.device)})
    for case in tqdm(missing, unit="case"):
        try:
            row = measure(case, conditions, repeats)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            row = to_row(case, conditions) | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        row |= {"repeats": repeats, "about": machine(conditions.device)}
        _append(path, row)
        done[key_of(case, conditions)] = row
        if conditions.device == "cuda":
            torch.cuda.empty_cache()
    return [done[key_of(case, conditions)] for case in here]


def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return key_of(Case.from_row(row), Conditions.from_row(row))


def _same_machine(row: dict[str, Any], conditions: Conditions) -> bool:
    return all(row[name] == getattr(conditions, name) for name in ("device", "dtype", "threads", "machine"))


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # a line that a kill cut off
        file.write(json.dumps(row).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a case stays above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokens", type=int, default=4096, help="of a layer's input (default 4096)")
    parser.add_argument("--batch", type=int, default=8, help="images of a model's or convolution's input (default 8)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each method, alternating (default 9)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results, a JSON object a line")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine(options.device)
    conditions = Conditions(
        device=options.device,
        dtype=options.dtype,
        tokens=options.tokens,
        batch=options.batch,
        threads=torch.get_num_threads(),
        machine=about.get("gpu", about["cpu"]),
    )
    rows = complete(SUITES[options.suite], conditions, options.repeats, options.output)
    missed = []
    for row in rows:
        case = Case.from_row(row)
        bound = limit(case, conditions)
        if "error" in row:
            print(f"{case.place}, {case.method}: {row['error']}", file=sys.stderr)
        elif bound is not None and _ratio(row, case) > bound:
            missed.append(
                f"{case.place}, blocks {case.block_size}, rank {case.rank}: {_ratio(row, case):.2f} > {bound}"
            )
    print(f"{len(rows)} cases in {options.output}; limits missed: {'; '.join(missed) or 'none'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
