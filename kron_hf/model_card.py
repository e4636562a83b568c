"""A minimal model card: what a reader needs to load a model with Kronecker layers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from torch import nn

from kron_hf.escaping import printable
from kron_hf.selection.groups import candidate_layers
from kron_hf.summary import kron_summary

__all__ = ["add_usage", "base_name", "write_model_card"]

MARKER = "<!-- written by kron_hf -->"


def write_model_card(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    report: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `README.md`: the line `import kron_hf`, how to load the model, its layers and its figures.

    Args:
        model: The model that was saved into `directory`.
        directory: Where the card goes; it must exist.
        name: Repository or path that the loading line names; None is the name of the directory. Cards are published:
            of a local path only the last part is told, here and in `dataset`.
        dataset: Data set that the metrics were measured on; needed with them.
        metrics: Figures of the model by name, such as `{"accuracy": 0.97}`.
        report: Further text, such as a table in plain characters, which is shown as it is.
        overwrite: Whether to replace a card that kron_hf did not write. Its own it always replaces.

    Returns:
        The path of the card.

    Raises:
        NotADirectoryError: `directory` is none.
        FileExistsError: There is a README.md from elsewhere.
        ValueError: Metrics without a data set.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"a model card needs the directory of a saved model, got {str(directory)!r}")
    if metrics and not dataset:
        raise ValueError(f"metrics {dict(metrics)} need dataset=, the name of the data they were measured on")
    path = directory / "README.md"
    if path.exists() and not overwrite and not _is_nobodys(path.read_text(encoding="utf-8")):
        raise FileExistsError(f"{path} exists and was not written by kron_hf; pass overwrite=True to replace it")
    name = _public(name or "") or directory.resolve().name
    dataset = dataset and _public(dataset)
    data = _card_data(model, name, dataset, metrics or {})
    # YAML leaves characters as they are that turn the direction of writing.
    front = printable(data.to_yaml(), keep="\n")
    content = f"---\n{front}\n---\n\n{_body(model, name, dataset, metrics or {}, report)}"
    ModelCard(content).save(path)
    return path


def add_usage(path: str | Path, model: nn.Module, name: str, *, layers: bool = True) -> None:
    """Adds the loading lines and the layers to a card that others wrote, such as Trainer's; does nothing twice.

    Args:
        path: The card.
        model: The model that it describes.
        name: Repository or path that the loading line names.
        layers: Whether to list them. Counting sharded ones (FSDP2) takes all processes.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if "import kron_hf" not in text:
        parts = [text.rstrip(), "## How to load", *_usage(model, _public(name))]
        if layers:
            parts.append(_fenced(str(kron_summary(model)), "text"))
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _is_nobodys(card: str) -> bool:
    """Whether no person wrote it: a card of ours, or the template that PEFT saves beside an adapter, not filled in."""
    return MARKER in card or ("# Model Card for Model ID" in card and card.count("[More Information Needed]") > 20)


def _public(name: str) -> str:
    return Path(name).name if name.startswith((".", "~")) or Path(name).is_absolute() else name


def _card_data(model: nn.Module, name: str, dataset: str | None, metrics: Mapping[str, float]) -> ModelCardData:
    options: dict[str, Any] = {"library_name": "transformers", "tags": ["kron_hf", "kronecker", "block-sparse"]}
    base: nn.Module = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        options |= {"library_name": "peft", "base_model": base_name(model)}
    is_classifier = type(base).__name__.endswith("ForImageClassification")
    if is_classifier:
        options["pipeline_tag"] = "image-classification"
    if metrics and dataset:
        task = "image-classification" if is_classifier else "other"
        options["model_name"] = name
        options["eval_results"] = [
            EvalResult(
                task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=key, metric_value=float(value)
            )
            for key, value in metrics.items()
        ]
    return ModelCardData(**options)


def _body(model: nn.Module, name: str, dataset: str | None, metrics: Mapping[str, float], report: str | None) -> str:
    parts = [MARKER, f"# {escape_markdown(name)}", *_usage(model, name)]
    if metrics:
        rows = [f"| {escape_markdown(key)} | {value:.4f} |" for key, value in metrics.items()]
        parts.append(f"Measured on {escape_markdown(dataset or '')}:")
        parts.append("\n".join(["| metric | value |", "|---|---|", *rows]))
    if report:
        parts.append(_fenced(printable(report, keep="\n"), "text"))
    parts.append(_fenced(str(kron_summary(model)), "text"))
    versions = f"torch {torch.__version__.partition('+')[0]}"
    parts.append(f"A zero of S makes a whole block of W exactly zero. Counted from the saved tensors with {versions}.")
    return "\n\n".join(parts) + "\n"


def _usage(model: nn.Module, name: str) -> list[str]:
    why = "import kron_hf  # teaches from_pretrained to build the Kronecker layers"
    if isinstance(model, PeftModel):
        loader = _loader(model.get_base_model())
        base = base_name(model) or "the base model"
        code = (
            f"{why}\nfrom peft import PeftModel\nfrom transformers import {loader}\n\n"
            f"base = {loader}.from_pretrained({base!r})\nmodel = PeftModel.from_pretrained(base, {name!r})\n"
        )
    else:
        loader = _loader(model)
        code = f"{why}\nfrom transformers import {loader}\n\nmodel = {loader}.from_pretrained({name!r})\n"
    kind = "An adapter that replaces the projections of a transformers model by"
    if not isinstance(model, PeftModel):
        kind = "A transformers model whose projections are"
    sums = " Their block size is not chosen yet: each is the sum of its candidates." if candidate_layers(model) else ""
    return [
        f"{kind} [Kronecker-sparse](https://arxiv.org/abs/2503.21928) layers of "
        f"`kron_hf`: `W = sum_i (S * A_i) (x) B_i`.{sums} It needs that package to load:",
        _fenced(code, "python"),
    ]


def base_name(model: PeftModel) -> str | None:
    """The adapted model as a card may name it: the id on the Hub, or None for a folder of this machine."""
    name = model.peft_config[model.active_adapters[0]].base_model_name_or_path
    return name if name and _public(name) == name and not Path(name).is_dir() else None


def _loader(model: nn.Module) -> str:
    name = type(model).__name__
    return "AutoModelForImageClassification" if name.endswith("ForImageClassification") else name


def _fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def escape_markdown(text: str) -> str:
    """Text as Markdown shows it literally, on one line: no markup, HTML, link or table cell can start in it."""
    text = printable(" ".join(text.split()))
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # GitHub makes links of bare addresses.
    return text.replace("://", ":&#47;/").replace("www.", "www&#46;").replace("@", "&#64;")
