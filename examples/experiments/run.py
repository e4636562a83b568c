"""Makes the runs of declared experiments that their files of results lack. Interrupted, it goes on where it was.

python -m examples.experiments.run --list
python -m examples.experiments.run mlp_fashion_mnist --jobs 2
"""

import argparse
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# Before torch is imported, here and in the processes of the runs: a run has one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tqdm.auto import tqdm

from examples.experiments.cases import Candidate, Experiment, Run
from examples.experiments.plan import EXPERIMENTS
from examples.experiments.results import RESULTS, append_row, read_rows
from examples.experiments.schedule import cost, next_runs

__all__ = ["complete", "main"]


def complete(experiment: Experiment, path: Path, *, jobs: int = 1, only: str = "") -> int:
    """Makes all missing runs, each in a process of its own, and writes each row when it is there.

    Args:
        experiment: What to complete.
        path: Its file of results.
        jobs: Runs at a time; each has one thread.
        only: Take the runs alone whose name (see `describe`) holds this text.

    Returns:
        How many runs failed: they have no row, and the next call tries them again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.experiments.training"])  # torch is imported once, not once a run
    rows, failed = read_rows(path), set[Run]()
    at_work: dict[Connection, tuple[Run, ForkServerProcess]] = {}
    with tqdm(initial=len(rows), unit="run", desc=experiment.recipe.experiment, disable=None) as bar:
        while True:
            busy = {run for run, _ in at_work.values()} | failed
            free = [run for run in next_runs(experiment, rows) if run not in busy and only in describe(run)]
            for run in free[: jobs - len(at_work)]:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, run, _is_pictured(experiment, run)))
                process.start()
                sender.close()  # the other end is the process's alone, so that its death shows
                at_work[receiver] = run, process
            if not at_work:
                return len(failed)
            for receiver in wait(list(at_work)):
                assert isinstance(receiver, Connection)
                run, process = at_work.pop(receiver)
                try:
                    rows[run] = receiver.recv()
                    append_row(path, rows[run])
                except EOFError:
                    failed.add(run)
                    tqdm.write(f"failed: {describe(run)}", file=sys.stderr)
                receiver.close()
                process.join()
                bar.update()


def describe(run: Run) -> str:
    """One line that names a run."""
    candidate = run.candidate
    block = "" if candidate.block_size is None else " {}x{}".format(*candidate.block_size)
    rank = "" if candidate.rank is None else f" rank {candidate.rank}"
    target = "" if candidate.target_sparsity is None else f" to {candidate.target_sparsity:g}"
    return f"{run.phase} {candidate.label}{block}{rank}{target}, rate {run.learning_rate:g}, seed {run.seed}"


def _work(sender: Connection, run: Run, keep_masks: bool) -> None:
    from examples.experiments.training import execute

    sender.send(execute(run, keep_masks=keep_masks))


def _is_pictured(experiment: Experiment, run: Run) -> bool:
    first = run.phase == "final" and run.seed == experiment.seeds[0]
    return first and isinstance(experiment.pictured, Candidate) and run.candidate == experiment.pictured


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true", help="show what is declared, what it costs and what is missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--only", default="", help="only runs whose name holds this text")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := set(options.experiments) - EXPERIMENTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not declared; there are {', '.join(EXPERIMENTS)}")
    names = options.experiments or list(EXPERIMENTS)
    paths = {name: options.output_dir / f"{name}.jsonl" for name in names}
    if options.list:
        for name, path in paths.items():
            runs, minutes = cost(EXPERIMENTS[name])
            rows = read_rows(path)
            print(f"{name}: about {runs} runs, {minutes:.0f} minutes on one core; {len(rows)} rows in its file")
            for run in next_runs(EXPERIMENTS[name], rows):
                if options.only in describe(run):
                    print(f"  {describe(run)}")
        return
    if not options.experiments:
        parser.error("name the experiments to run, or --list")
    failed = sum(complete(EXPERIMENTS[name], paths[name], jobs=options.jobs, only=options.only) for name in names)
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
