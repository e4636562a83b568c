"""Writes `model_cards/`: the template, and the cards of the reference models, trained here and now.

    python -m examples.model_cards

The reference model is that of `kron-hf demo`, which needs no download; a card is copied only after `kron-hf verify`
has confirmed it, its accuracy included. Some minutes on two cores.
"""

import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kron_hf.claims import CLAIMS_FILE
from kron_hf.command.options import DataOptions
from kron_hf.demo.run import run_demo
from kron_hf.demo.training import Recipe
from kron_hf.model_card import PICTURES
from kron_hf.verify.run import verify

FOLDER = Path(__file__).parent.parent / "model_cards"
NAME = "digits-kron-vit"


def write_cards(folder: Path = FOLDER, *, recipe: Recipe | None = None, write: Callable[[str], Any] = print) -> None:
    """Trains the reference model, verifies its card and copies card, pictures and claims."""
    folder.mkdir(exist_ok=True)
    template = files("kron_hf.model_card").joinpath("template.md").read_text(encoding="utf-8")
    (folder / "template.md").write_text(template, encoding="utf-8")
    with TemporaryDirectory() as scratch:
        model_folder = Path(scratch, NAME)
        run_demo(model_folder, recipe=recipe, write=write, card={"license": "apache-2.0", "commit": _commit()})
        report = verify(str(model_folder), data=DataOptions(dataset="digits"))
        write(str(report))
        if not report.holds:
            raise RuntimeError("the card does not hold what it claims")
        target = folder / NAME
        target.mkdir(exist_ok=True)
        pictures = [name for name in PICTURES if (model_folder / name).is_file()]
        for name in ("README.md", CLAIMS_FILE, *pictures):
            shutil.copyfile(model_folder / name, target / name)


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    write_cards()
