"""Runs the tests that lean on other libraries with their lowest and their newest supported versions.

    python tests/matrix.py             # both
    python tests/matrix.py lowest      # one
    python tests/matrix.py --list      # what would be installed and run

The versions are pinned in `tests/pins/`. Each set is installed, without what it depends on, into a folder that is put
in front of the environment this runs in, so torch and all the rest stay as they are there. Ends with 0 if all passed, 1
if a test failed, 3 if a set could not be installed.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PINS = {path.stem: path for path in sorted((ROOT / "tests" / "pins").glob("*.txt"))}
# What touches transformers, peft, accelerate or huggingface_hub; mathematics and the layers do not.
TESTS = [
    "tests/test_private_attributes.py",
    "tests/test_private_torch.py",
    "tests/test_private_loading.py",
    "tests/test_private_training.py",
    "tests/test_private_peft.py",
    "tests/test_config.py",
    "tests/test_targets.py",
    "tests/test_model.py",
    "tests/test_checkpoint.py",
    "tests/test_compact.py",
    "tests/test_training_checkpoints.py",
    "tests/test_trainer.py",
    "tests/test_callbacks.py",
    "tests/test_peft_type.py",
    "tests/test_peft_adapters.py",
    "tests/test_peft_loading.py",
    "tests/test_peft_refusals.py",
    "tests/test_hub.py",
]
PASSED, FAILED, NOT_INSTALLED = 0, 1, 3


class Row(NamedTuple):
    """One line of the table."""

    name: str
    versions: dict[str, str]
    code: int
    result: str
    seconds: float


def pinned(name: str) -> dict[str, str]:
    lines = PINS[name].read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def run_set(name: str, folder: Path, tests: list[str]) -> Row:
    """Installs one set into a folder and runs the tests with it."""
    start = time.monotonic()
    code, result = _install(name, folder) or _run_tests(folder, tests)
    return Row(name, pinned(name), code, result, time.monotonic() - start)


def _install(name: str, folder: Path) -> tuple[int, str] | None:
    options = ["--quiet", "--no-deps", "--no-compile", "--target", str(folder), "--requirement", str(PINS[name])]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
    if done.returncode != 0:
        sys.stdout.write(done.stdout + done.stderr)
        return NOT_INSTALLED, "pip could not install it"
    code = "import sys\nfrom importlib.metadata import version\nprint(*map(version, sys.argv[1:]))"
    command = [sys.executable, "-c", code, *pinned(name)]
    found = subprocess.run(command, env=_environment(folder), capture_output=True, text=True, check=True).stdout.split()
    return None if found == list(pinned(name).values()) else (NOT_INSTALLED, f"found {' '.join(found)}")


def _run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
    with subprocess.Popen(command, cwd=ROOT, env=_environment(folder), stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    counts = re.match(r"=*\s*(.*?) in [\d.]+s", lines[-1]) if lines else None
    result = counts[1] if counts else f"pytest ended with {process.returncode}"
    return PASSED if process.returncode == 0 else FAILED, result


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def table(rows: list[Row]) -> str:
    """The result of every set: its versions, its tests, the time."""
    names = list(rows[0].versions)
    lines = [["set", "torch", *names, "tests", "seconds"]]
    for row in rows:
        shown = [row.versions[name] for name in names]
        lines.append([row.name, version("torch"), *shown, row.result, f"{row.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Runs the tests with the lowest and the newest supported versions of transformers, peft, ..."
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(PINS)}; all if none is given")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="other tests than those of --list")
    parser.add_argument("--list", action="store_true", help="show the sets and the tests, and run nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.sets) - PINS.keys()):
        parser.error(f"no set {', '.join(map(repr, unknown))}; there are {', '.join(PINS)}")
    sets = options.sets or list(PINS)
    if options.list:
        for name in sets:
            sys.stdout.write(f"{name}: {', '.join(f'{key} {value}' for key, value in pinned(name).items())}\n")
        sys.stdout.write("\n".join(["tests:", *options.tests]) + "\n")
        return PASSED
    rows = []
    for name in sets:
        with TemporaryDirectory(prefix="kron_hf-matrix-") as folder:
            rows.append(run_set(name, Path(folder), options.tests))
    sys.stdout.write("\n" + table(rows) + "\n")
    return max(row.code for row in rows)


if __name__ == "__main__":
    sys.exit(main())
