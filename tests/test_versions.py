"""The supported versions: stated alike everywhere, and refused by `import kron_hf` outside of them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from kron_hf import versions

ROOT = Path(__file__).parent.parent
FOUND = {
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "huggingface_hub": "2.4.0",
    "safetensors": "0.8.0",
}


def pins(path):
    lines = (ROOT / path).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def import_with(folder, **found):
    """`import kron_hf` in a fresh process that finds these versions installed."""
    for name, version in found.items():
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = "import sys\ntry:\n    import kron_hf\nfinally:\n    print('torch' in sys.modules)"
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture
def found(monkeypatch):
    """The versions that the check finds; None is a package that is not installed."""
    given = dict(FOUND)

    def version(name):
        if given[name] is None:
            raise versions.PackageNotFoundError(name)
        return given[name]

    monkeypatch.setattr(versions, "version", version)
    return given


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("transformers", "5.18.0"),
        ("transformers", "5.18.0.dev0"),
        ("transformers", "5.99.1"),
        ("torch", "2.11.0"),
        ("torch", "2.11.0a0+git1234"),
        ("torch", "2.16.0.dev20270101+cu130"),
        ("peft", "0.99"),
    ],
)
def test_supported(found, name, version):
    found[name] = version
    versions.check_versions()


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("transformers", "5.17.9"),
        ("transformers", "6.0.0"),
        ("transformers", "6.0.0.dev0"),
        ("torch", "2.10.1+cpu"),
        ("peft", "0.20.0"),
        ("accelerate", "1.11.0"),
        ("huggingface_hub", "2.1.1"),
        ("safetensors", "0.7.0"),
        ("torch", None),
        ("torch", "built on Monday"),
    ],
)
def test_unsupported(found, name, version):
    found[name] = version
    wanted = f"{name}{versions.REQUIRED[name]}"
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    assert str(error.value) == f'kron_hf needs {wanted} (found: {version or "none"}). Run: pip install "{wanted}"'


def test_all_that_is_unsupported_is_named_at_once(found):
    found.update(transformers="5.8.0", peft=None)
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    assert str(error.value) == (
        "kron_hf needs transformers>=5.18,<6 (found: 5.8.0), peft>=0.21,<1 (found: none). "
        'Run: pip install "transformers>=5.18,<6" "peft>=0.21,<1"'
    )


def test_import_fails_before_anything_heavy_is_imported(tmp_path):
    done = import_with(tmp_path, transformers="5.8.0")
    assert done.returncode == 1
    assert done.stdout == "False\n"
    last = done.stderr.splitlines()[-1]
    assert last == (
        'ImportError: kron_hf needs transformers>=5.18,<6 (found: 5.8.0). Run: pip install "transformers>=5.18,<6"'
    )


def test_pyproject_requires_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {item.name: item.specifier for item in map(Requirement, project["dependencies"]) if item.specifier}
    assert stated == {name: Requirement(name + bounds).specifier for name, bounds in versions.REQUIRED.items()}


def test_lowest_pins_are_the_lower_bounds():
    lowest = pins("tests/pins/lowest.txt")
    for name, bounds in versions.REQUIRED.items() - {("torch", versions.REQUIRED["torch"])}:
        assert Version(lowest[name]) == Version(re.search(r">=([\d.]+)", bounds)[1]), name


@pytest.mark.parametrize("path", ["tests/pins/newest.txt", "constraints.txt"])
def test_pinned_versions_are_supported(path, found):
    found.update((name, version) for name, version in pins(path).items() if name in found)
    versions.check_versions()


def test_pin_files_pin_the_same_packages():
    assert pins("tests/pins/lowest.txt").keys() == pins("tests/pins/newest.txt").keys()


def test_readme_states_the_pinned_versions():
    readme = (ROOT / "README.md").read_text()
    lowest, newest = pins("tests/pins/lowest.txt"), pins("tests/pins/newest.txt")
    for name in ("transformers", "peft", "accelerate", "huggingface_hub", "safetensors"):
        assert f"| {name} | {lowest[name]} | {newest[name]} | {versions.REQUIRED[name]} |" in readme
    bounds, torch = versions.REQUIRED["torch"], pins("constraints.txt")["torch"]
    assert f"| torch | {re.search(r'>=([0-9.]+)', bounds)[1]}.0 | {torch} | {bounds} |" in readme
