"""Writes the table of tested families into README.md: `python tests/readme_families.py`."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import transformers as hf
from families import ALL_FAMILIES, Family
from torch import nn

from kron_hf import KronConfig
from kron_hf.targets import find_targets

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- families: written by tests/readme_families.py -->", "<!-- /families -->"
VAGUE = {"dense", "linear", "proj", "projection", "layers", "out_proj"}  # these say little without what is before them


def table() -> str:
    """One line an architecture: the classes tested, what the default converts, which other linears it leaves."""
    groups: dict[str, list[Family]] = {}
    for family in ALL_FAMILIES.values():
        groups.setdefault(family.title.partition(",")[0], []).append(family)
    rows = ["| family | tested classes | become Kronecker layers | stay dense |", "|---|---|---|---|"]
    return "\n".join([*rows, *(_row(title, families) for title, families in groups.items())])


def updated(text: str) -> str:
    """The text with the present table between its markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


def _row(title: str, families: list[Family]) -> str:
    chosen, left = [], []
    models = [family() for family in families]
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets = {target.name for target in find_targets(model, KronConfig(block_size=4, rank=1))}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                (chosen if name in targets else left).append(name)
    becomes = dict.fromkeys(map(_short, chosen))
    stays = dict.fromkeys(_end(name, 3) if _short(name) in becomes else _short(name) for name in left)
    classes = dict.fromkeys(type(model).__name__ for model in models)
    return f"| {title} | {_listed(classes)} | {_listed(becomes)} | {_listed(stays)} |"


def _short(name: str) -> str:
    return _end(name, 2 if _end(name, 1) in VAGUE else 1)


def _end(name: str, parts: int) -> str:
    """The last parts of a name, numbers left out."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-parts:])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    README.write_text(updated(README.read_text()))
