"""Which versions of torch and of the Hugging Face libraries this package works with, checked when it is imported."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = ["REQUIRED", "check_versions"]

# The same as in pyproject.toml. Lower bounds are run by `python tests/matrix.py`. What sets them: transformers 5.18
# brought the hook that sees a config before its model is built, and DINOv2's module names of today; peft 0.21 the one
# through which a tuner maps stored names; huggingface_hub before 2.2 sends the token along, and finds no file, where a
# download is redirected to another port of the same host; torch, accelerate and safetensors are the lowest that were
# run.
# Upper bounds are the next major versions, where private parts that this package touches may go; what is newer than
# any that has been run, but below them, is let in.
REQUIRED = {
    "torch": ">=2.11,<3",
    "transformers": ">=5.18,<6",
    "peft": ">=0.21,<1",
    "accelerate": ">=1.12,<2",
    "huggingface_hub": ">=2.2,<3",
    "safetensors": ">=0.8,<1",
}


def check_versions() -> None:
    """Compares the installed versions with `REQUIRED`, from their metadata alone: nothing of them is imported.

    Pre-releases and local builds (`2.13.0+cpu`, `2.13.0a0+git1234`) count as the release that they belong to.

    Raises:
        ImportError: A package is missing or outside of its range; names all of these, what was found, and the command
            that installs what is needed.
    """
    found = {name: _installed(name) for name in REQUIRED}
    outside = [name for name, given in found.items() if not _is_supported(given, REQUIRED[name])]
    if outside:
        listed = ", ".join(f"{name}{REQUIRED[name]} (found: {found[name] or 'none'})" for name in outside)
        wanted = " ".join(f'"{name}{REQUIRED[name]}"' for name in outside)
        raise ImportError(f"kron_hf needs {listed}. Run: pip install {wanted}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_supported(given: str | None, required: str) -> bool:
    try:
        return given is not None and SpecifierSet(required).contains(Version(given).base_version)
    except InvalidVersion:
        return False


check_versions()
