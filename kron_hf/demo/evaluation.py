"""Loads saved models in a fresh process and measures them: `python -m kron_hf.demo.evaluation DIRECTORY ...`."""

import json
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["evaluate_in_fresh_process"]


def evaluate_in_fresh_process(directories: list[Path]) -> list[dict[str, float]]:
    """Validation and test accuracy of saved models on the digits, measured by another Python.

    Raises:
        RuntimeError: That process failed; carries what it wrote.
    """
    command = [sys.executable, "-m", "kron_hf.demo.evaluation", *map(str, directories)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"loading the saved models in a fresh process failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(directories: list[str]) -> None:
    from transformers import AutoModelForImageClassification

    import kron_hf  # noqa: F401  # teaches from_pretrained to build the Kronecker layers
    from kron_hf.demo.images import load_image_data
    from kron_hf.demo.training import accuracy

    data = load_image_data("digits")
    results: list[dict[str, float]] = []
    for directory in directories:
        model = AutoModelForImageClassification.from_pretrained(directory)
        results.append({"validation": accuracy(model, data.validation), "test": accuracy(model, data.test)})
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
