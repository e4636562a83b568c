"""kill -9 at random moments of training and of saving: the same command again ends with the same bits."""

import os
import random
import signal
import time
from collections import Counter

import pytest
from safetensors.torch import load_file
from tiny_runs import (
    assert_equal,
    assert_same_checkpoint,
    checkpoints,
    command,
    fork_server,
    write_idx_folder,
)

from kron_hf import last_checkpoint

pytestmark = pytest.mark.slow

KILLS = 50
KINDS = ("any moment", "saving", "ending", "saving", "any moment")
LAST = "checkpoint-100"


@pytest.fixture(scope="module")
def server():
    with fork_server() as started:
        yield started


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The uninterrupted run, all of its checkpoints kept, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_idx_folder(folder / "data")
    begin = time.monotonic()
    arguments = command(data, folder / "run", "--save-total-limit", 100)
    assert server.run(arguments, folder / "log") == 0, (folder / "log").read_text()
    assert [path.name for path in checkpoints(folder / "run")] == [f"checkpoint-{step}" for step in range(5, 101, 5)]
    return data, folder / "run", time.monotonic() - begin


def names(directory):
    try:
        return set(os.listdir(directory))  # noqa: PTH208  # one system call: it runs in a tight loop
    except FileNotFoundError:
        return set()


def wait_until(condition, limit=120.0):
    end = time.monotonic() + limit
    while time.monotonic() < end and not condition():
        time.sleep(0.0005)


def await_moment(kind, run, duration, chance):
    """Sleeps until the moment to kill; the run may end before."""
    if kind == "any moment":
        time.sleep(chance.uniform(0, 0.4 * duration))
    elif kind == "saving":
        for _ in range(chance.randint(1, 4)):
            wait_until(lambda: "_kron_train.json" not in names(run) or not unfinished(run), limit=duration)
            wait_until(lambda: unfinished(run), limit=duration)
        time.sleep(chance.uniform(0, 0.008 * duration))
    else:
        wait_until(lambda: LAST in names(run), limit=4 * duration)
        time.sleep(chance.uniform(0, 0.1 * duration))


def unfinished(run):
    return any(name.startswith("_unfinished-") for name in names(run))


def phase(run):
    """In which phase the process died, from what it left."""
    left = names(run)
    if any(name.startswith("_unfinished-checkpoint") for name in left):
        return "writing a checkpoint"
    if any(name.startswith("_discarded-") for name in left):
        return "deleting a checkpoint"
    if "_unfinished-model" in left:
        return "saving the final model"
    if "config.json" in left:
        return "after the final model"
    if LAST in left:
        return "final evaluation"
    return "training" if any(name.startswith("checkpoint-") for name in left) else "starting"


def assert_nothing_half_written(run, whole_run):
    found = checkpoints(run)
    for checkpoint in found:
        assert_same_checkpoint(checkpoint, whole_run / checkpoint.name)
    assert last_checkpoint(run) == (str(found[-1]) if found else None)
    if (run / "config.json").exists():
        assert (run / "config.json").read_bytes() == (whole_run / "config.json").read_bytes()
        assert_equal(load_file(run / "model.safetensors"), load_file(whole_run / "model.safetensors"))


def assert_same_end(run, whole_run):
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md", "all_results.json"):
        assert (run / name).read_bytes() == (whole_run / name).read_bytes(), name
    assert not [path.name for path in run.iterdir() if path.name.startswith(("_unfinished-", "_discarded-"))]
    assert_same_checkpoint(run / LAST, whole_run / LAST)


def test_kill_9_at_random_moments(server, whole, tmp_path, figures):
    data, whole_run, duration = whole
    chance, phases, runs, resumed = random.Random(0), Counter(), 0, 0
    while phases.total() < KILLS:
        run, runs = tmp_path / str(runs) / "run", runs + 1
        run.parent.mkdir()
        log = run.parent / "log"
        for _ in range(chance.randint(2, 6)):  # the next one kills the run that goes on after this one
            pid = server.start(command(data, run), log)
            await_moment(KINDS[phases.total() % len(KINDS)], run, duration, chance)
            os.kill(pid, signal.SIGKILL)
            status = server.wait(pid)
            if status != -signal.SIGKILL:
                assert status == 0, log.read_text()
                break
            phases[phase(run)] += 1
            assert_nothing_half_written(run, whole_run)
        assert server.run(command(data, run), log) == 0, log.read_text()
        resumed += "Going on from" in log.read_text()
        assert_same_end(run, whole_run)
    listed = ", ".join(f"{count} {name}" for name, count in phases.most_common())
    figures(f"{phases.total()} kills in {runs} runs survived, bit for bit ({listed}); {resumed} runs resumed")
    assert resumed > 0
    assert phases["training"] > 0
    assert phases["writing a checkpoint"] > 0
