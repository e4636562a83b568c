"""`kron-hf inspect` from a name to the page."""

from pathlib import Path

from kron_hf.page.html import build_page
from kron_hf.page.layers import layer_pictures
from kron_hf.summary import kron_summary
from kron_hf.training_history import curves_of, read_history
from kron_hf.verify.source import find_directory, load_model

__all__ = ["write_page"]


def write_page(name: str, path: Path, *, revision: str | None = None, base: str | None = None) -> None:
    """Writes the page of a saved model, whole or not at all.

    Args:
        name: Folder of the model, or its id on the Hub. The curves are those of a `trainer_state.json` in the folder,
            or in the newest checkpoint of it.
        path: The file.
        revision: Branch, tag or commit on the Hub.
        base: The base of an adapter; None is the one that it names.

    Raises:
        OSError: The model cannot be found, or the file not be written.
        ValueError: The files are damaged, or hold no Kronecker layers.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, --html needs the name of a file")
    if not path.absolute().parent.is_dir():
        raise NotADirectoryError(f"{path.parent} is no directory to write {path.name} into")
    directory = find_directory(name, revision)
    curves = curves_of(read_history(directory))
    model = load_model(directory, base=base)
    summary = kron_summary(model)
    title = directory.resolve().name if Path(name).is_dir() else name
    page = build_page(title, type(model).__name__, summary, layer_pictures(model), curves)
    partial = path.with_name(f"_{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
