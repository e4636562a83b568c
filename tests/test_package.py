"""The package as a whole: what importing it costs, which module may import which, style and types."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import kron_hf

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "kron_hf").rglob("*.py"))
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub"}
TORCH_ONLY = (
    *("factors", "sharding", "ops", "layers", "selection", "sparsity", "calibration", "distillation"),
    *("evaluation_mode", "param_groups", "summary", "block_size", "kron_layer", "conv_layer", "kron_kinds"),
)
# Lower layers first: a module imports only from its own row or from rows above it.
ORDER = [
    {
        "versions",
        "escaping",
        "evaluation_mode",
        "factors",
        "block_size",
        "metrics",
        "weight_reads",
        "sharding",
        "data",
        "bounded_json",
        "training_history",
    },
    {"peft_type", "module_map", "ops", "config_checks"},
    {"calibration_config"},
    {"config", "kron_layer"},
    {"layers", "conv_layer"},
    {"kron_kinds"},
    {"sparsity", "selection", "calibration", "distillation", "checkpoint", "target", "target_messages"},
    {"targets"},
    {"calibration_data", "inference", "param_groups", "surgery"},
    {"baselines", "callbacks", "block_size_callback", "conversion", "held_out_loss", "summary"},
    {"model", "prepared"},
    {"claims", "peft_tuner"},
    {"model_card"},
    {"trainer", "hub"},
    {"command"},
    {"demo"},
    {"bench", "compress", "deploy", "page", "train", "verify"},
    {"cli", "__main__", "__init__"},
]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def unit(path: Path) -> str:
    """The module or sub-package directly below kron_hf that a file belongs to."""
    return path.relative_to(ROOT / "kron_hf").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    rank = {name: row for row, names in enumerate(ORDER) for name in names}
    imported = {name.split(".")[1] for name in imported_modules(path) if name.startswith("kron_hf.")}
    upward = {name for name in imported if rank[name] > rank[unit(path)]}
    assert not upward
    if unit(path) in TORCH_ONLY:
        assert not {name.split(".")[0] for name in imported_modules(path)} & HUGGING_FACE


def test_the_algorithms_of_the_baselines_are_plain_torch():
    """Only what finds layers in a model, converts it or is a callback knows Hugging Face."""
    folder = ROOT / "kron_hf" / "baselines"
    paths = {path for path in folder.glob("*.py") if path.stem not in {"__init__", "callbacks", "targets", "to_kron"}}
    assert {path.stem for path in paths} >= {"block_layer", "group_lasso", "magnitude", "options", "pruner", "rigl"}
    allowed = {f"kron_hf.{name}" for name in (*TORCH_ONLY, *(f"baselines.{path.stem}" for path in paths))}
    for path in paths:
        imported = imported_modules(path)
        assert not {name.split(".")[0] for name in imported} & HUGGING_FACE
        assert all(name in allowed or name.startswith("kron_hf.sparsity.") for name in imported if "kron_hf" in name)


def test_importing_kron_hf_is_light():
    # Not triton itself: torch imports it by itself where it is installed.
    heavy = ["kron_hf.ops.fused.kernels", "datasets", "evaluate", "matplotlib", "sklearn"]
    code = f"import sys, kron_hf; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_public_names_are_sorted_and_exist():
    assert list(kron_hf.__all__) == sorted(kron_hf.__all__)
    assert all(hasattr(kron_hf, name) for name in kron_hf.__all__)


def test_constraints_pin_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split("[>=;[ ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names - {"kron-hf"} <= pinned


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright", "--pythonpath", sys.executable]],
    ids=["ruff check", "ruff format", "pyright"],
)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
