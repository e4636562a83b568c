"""Runs checks on two processes: `run` starts a script of this folder under torchrun, which calls `main`.

Each check is a function of a folder that both ranks call; what it raises, or returns as figures, comes back by name.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 2


def run(script, checks, folder, timeout):
    """Results of the named checks of a script: `{name: {"error": text or None, "figures": ..., "seconds": ...}}`."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(Path(__file__).parent / script), str(folder), *checks],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    files = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    reports = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    results = {}
    for name in checks:
        own = [report[name] for report in reports if name in report]
        errors = [result["error"] for result in own if result["error"] is not None]
        if len(own) < RANKS:  # not reached after an earlier error, or one rank hung or died in it
            errors.append(f"finished on {len(own)} of {RANKS} ranks: {done.stderr[-4000:]}")
        results[name] = {
            "figures": None,
            "seconds": None,
            **(own[0] if own else {}),
            "error": "\n".join(errors) or None,
        }
    return results


def main(functions):
    """The script's side: calls the checks that the command line names and writes what came of them."""
    folder, *names = sys.argv[1:]
    folder = Path(folder)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name in names:
        own = folder / name
        own.mkdir(exist_ok=True)
        began = time.monotonic()
        result = {"error": None, "figures": None}
        try:
            torch.manual_seed(0)
            assert dist.get_world_size() == RANKS
            result["figures"] = functions[name](own)
        except Exception:
            result["error"] = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        results[name] = {**result, "seconds": round(time.monotonic() - began, 2)}
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
        failed = torch.tensor(int(result["error"] is not None))
        dist.all_reduce(failed)
        if failed:
            break  # the ranks may no longer be at the same place
    dist.destroy_process_group()
