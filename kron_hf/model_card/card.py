"""`write_model_card`: what a model is, counted from it; its pictures; and its claims in a file beside."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn

from kron_hf.claims import Claims, MetricClaim, claimed_files, count, file_claim, merge_difference, write_claims
from kron_hf.claims.count import frozen_names
from kron_hf.claims.files import CARD, is_weights
from kron_hf.claims.record import is_finite_number
from kron_hf.escaping import printable
from kron_hf.model_card.curves import draw_curves
from kron_hf.model_card.figures import figures_section
from kron_hf.model_card.latency import Latency
from kron_hf.model_card.markdown import MARKER, escape_markdown, fenced, public_name, table
from kron_hf.model_card.metadata import card_data, checked_license, find_base
from kron_hf.model_card.training import public_settings
from kron_hf.model_card.usage import usage
from kron_hf.sharding import is_sharded
from kron_hf.sparsity.pruning import kron_layers
from kron_hf.summary import KronSummary
from kron_hf.summary.picture import draw_masks
from kron_hf.training_history import curves_of

__all__ = ["MERGE_TOLERANCE", "PICTURES", "write_model_card"]

PICTURES = MASKS, CURVES, *_ = ("kron_masks.png", "kron_training.png", "kron_speed.png", "kron_roofline.png")
PLOTS = {"speed": PICTURES[2], "roofline": PICTURES[3]}
PNG = b"\x89PNG\r\n\x1a\n"
MERGE_TOLERANCE = 1e-9  # in float64, where sums of a few thousand terms agree to 1e-12


def write_model_card(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    metrics: Mapping[str, float] | None = None,
    report: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    base_license: str | None = None,
    training: Any = None,
    history: Iterable[Any] | None = None,
    latency: Latency | None = None,
    plots: Mapping[str, str | Path] | None = None,
    commit: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `README.md` beside a saved model, its pictures, and `kron_claims.json`, which `kron-hf verify` checks.

    Save the model first: the card tells the size and checksum of its files. Pictures (`kron_masks.png`, and
    `kron_training.png` with a history) are drawn where matplotlib is installed.

    Args:
        model: The model that was saved into `directory`.
        directory: Where the card goes; it must exist.
        name: Repository or path that the loading line names; None is the name of the directory. Cards are published:
            of a local path only the last part is told, here and in `dataset`.
        dataset: Data set that the metrics were measured on; needed with them.
        split: Which part of it: `"test"` or `"validation"`.
        metrics: Figures of the model by name, such as `{"accuracy": 0.97}`.
        report: Further text, such as a table in plain characters, which is shown as it is.
        base_model: Id of the model that this one was made from; None is the one on the Hub that it was loaded from.
        license: Licence of this model, as the Hub abbreviates it.
        base_license: Licence of the base model.
        training: How it was trained: `TrainingArguments`, or a mapping. Only what `kron_hf.model_card.training` lists
            is told: no paths, names or tokens.
        history: Trainer's `state.log_history`.
        latency: What `measure_latency` gave.
        plots: PNG files of benchmarks, "speed" and "roofline", as `python -m examples.benchmarks.report --plots` draws
            them; they are copied.
        commit: Commit of the code that trained it.
        overwrite: Whether to replace a card that kron_hf did not write. Its own it always replaces.

    Returns:
        The path of the card.

    Raises:
        NotADirectoryError: `directory` is none.
        FileExistsError: There is a README.md from elsewhere.
        ValueError: Metrics without a data set or that are not finite, a licence that is no abbreviation, or plots of
            other names or formats.
    """
    directory, contents = Path(directory), _read_plots(plots or {})
    if not directory.is_dir():
        raise NotADirectoryError(f"a model card needs the directory of a saved model, got {str(directory)!r}")
    if metrics and not dataset:
        raise ValueError(f"metrics {dict(metrics)} need dataset=, the name of the data they were measured on")
    if wrong := [key for key, value in (metrics or {}).items() if not is_finite_number(float(value))]:
        raise ValueError(f"metrics must be finite numbers, got {wrong[0]!r}: {dict(metrics or {})[wrong[0]]}")
    path = directory / CARD
    if path.exists() and not overwrite and not _is_nobodys(path.read_text(encoding="utf-8")):
        raise FileExistsError(f"{path} exists and was not written by kron_hf; pass overwrite=True to replace it")
    name = public_name(name or "") or directory.resolve().name
    measured = [
        MetricClaim(metric=key, value=float(value), dataset=public_name(dataset or ""), split=split or "")
        for key, value in (metrics or {}).items()
        if key != "sparsity"  # no measurement on data: it is among the figures that are counted
    ]
    stated = {
        "base_model": base_model or find_base(model),
        "license": checked_license(license),
        "base_license": checked_license(base_license),
        "training": public_settings(training),
        "latency": None if latency is None else asdict(latency),
        "commit": commit,
        "versions": _versions(),
    }
    summary, whole, layers = count(model)
    drawn = _draw(directory, summary, history) | _write_plots(directory, contents)
    weights = {file: file_claim(directory / file) for file in claimed_files(directory) if is_weights(file)}
    front = card_data(model, name, measured, base_model=stated["base_model"], license=license)
    figures = figures_section(summary, whole, weights, measured)
    _save(path, _render(model, name, front.to_yaml(), figures, drawn, stated, weights, report, bool(measured)))
    claims = Claims(
        kron_hf=version("kron_hf"),
        model_class=type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__,
        whole=whole,
        layers=layers,
        frozen=frozen_names(model),
        merges=_merges(model),
        files=weights
        | {file: file_claim(directory / file) for file in claimed_files(directory) if file not in weights},
        metrics=measured,
        stated=stated,
    )
    write_claims(claims, directory)
    return path


def _is_nobodys(card: str) -> bool:
    """Whether no person wrote it: a card of ours, or the template that PEFT saves beside an adapter, not filled in."""
    return MARKER in card or ("# Model Card for Model ID" in card and card.count("[More Information Needed]") > 20)


def _versions() -> dict[str, str]:
    numbers = {"kron_hf": version("kron_hf"), "torch": torch.__version__, "transformers": transformers.__version__}
    return {name: number.partition("+")[0] for name, number in numbers.items()}


def _merges(model: nn.Module) -> bool:
    """Whether dense layers would give the same outputs; False where the factors are not here to be tried."""
    layers = kron_layers(model)
    if any(layer.s.is_meta or is_sharded(layer.s) for layer in layers):
        return False
    return merge_difference(model) <= MERGE_TOLERANCE


def _draw(directory: Path, summary: KronSummary, history: Iterable[Any] | None) -> dict[str, str]:
    """Draws what there is, and removes pictures of an earlier model."""
    made: dict[str, str] = {}
    for key, file, draw in (
        ("masks", MASKS, lambda: draw_masks(summary)),
        ("curves", CURVES, lambda: draw_curves(curves_of(history or []))),
    ):
        (directory / file).unlink(missing_ok=True)
        with suppress(ImportError, ValueError):  # no matplotlib, or nothing to draw
            # Without the version of matplotlib in it, the same model gives the same file.
            draw().savefig(directory / file, dpi=100, metadata={"Software": None})
            made[key] = file
    return made


def _read_plots(plots: Mapping[str, str | Path]) -> dict[str, bytes]:
    if unknown := plots.keys() - PLOTS.keys():
        raise ValueError(f"plots must be named {' or '.join(PLOTS)}, got {sorted(unknown)}")
    contents = {name: Path(path).read_bytes() for name, path in plots.items()}
    if wrong := [name for name, content in contents.items() if not content.startswith(PNG)]:
        raise ValueError(f"plots must be PNG files, and {wrong[0]} is none")
    return contents


def _write_plots(directory: Path, contents: Mapping[str, bytes]) -> dict[str, str]:
    """Writes those that were given, and removes those of an earlier model."""
    for name, file in PLOTS.items():
        (directory / file).unlink(missing_ok=True)
        if name in contents:
            (directory / file).write_bytes(contents[name])
    return {name: PLOTS[name] for name in contents}


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    # No autoescape: it is Markdown, and every value is escaped as such, below.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(files("kron_hf.model_card").joinpath("template.md").read_text(encoding="utf-8"))


def _render(
    model: nn.Module,
    name: str,
    front_matter: str,
    figures: str,
    drawn: Mapping[str, str],
    stated: Mapping[str, Any],
    weights: Mapping[str, Any],
    report: str | None,
    is_measured: bool,
) -> str:
    introduction, loading = usage(model, name)
    latency = stated["latency"]
    if latency is not None:
        ratio = f"{latency['milliseconds'] / latency['dense_milliseconds']:.2f}"
        latency = {**latency, "ratio": ratio, "measured_on": escape_markdown(latency["measured_on"])}
    return _template().render(
        # YAML leaves characters as they are that turn the direction of writing.
        front_matter=printable(front_matter.rstrip("\n"), keep="\n"),
        marker=MARKER,
        title=escape_markdown(name),
        introduction=introduction,
        loading=loading,
        base_model=_in_code(stated["base_model"]),
        figures=figures,
        masks=drawn.get("masks"),
        curves=drawn.get("curves"),
        speed=drawn.get("speed"),
        roofline=drawn.get("roofline"),
        latency=latency,
        report=report and fenced(printable(report, keep="\n"), "text"),
        settings=_settings(stated["training"]),
        versions=", ".join(f"{package} {number}" for package, number in stated["versions"].items()),
        commit=_in_code(stated["commit"]),
        limits=_limits(is_measured, latency is not None),
        verification=fenced(_command(name, weights), "sh"),
        licence=_licence(stated),
    )


def _in_code(text: str | None) -> str:
    return printable(text or "").replace("`", "'")


def _settings(settings: Mapping[str, Any]) -> str:
    return (
        table(("setting", "value"), [(escape_markdown(key), f"{value}") for key, value in settings.items()])
        if (settings)
        else ""
    )


def _limits(is_measured: bool, is_timed: bool) -> list[str]:
    limits = [
        "It was measured on the data named above and on nothing else; what it does with other data is not known."
        if is_measured
        else "How good it is was not measured.",
        "It needs `kron_hf` to load. `kron_hf.to_dense(model)` gives plain layers, as large as the dense ones.",
    ]
    if not is_timed:
        limits.append("Its speed was not measured; small layers, high ranks and few tokens may be slower than dense.")
    return limits


def _command(name: str, weights: Mapping[str, Any]) -> str:
    """A line for a shell, or no more than its form where the name is no word."""
    word = name if name and all(c.isascii() and (c.isalnum() or c in "/._-") for c in name) else "DIR_OR_ID"
    pin = f" --sha256 {next(iter(weights.values())).sha256}" if len(weights) == 1 else ""
    return f"kron-hf verify {word.lstrip('-')}{pin}"


def _licence(stated: Mapping[str, Any]) -> str:
    own, base = stated["license"], stated["base_license"]
    text = f"Licence of this model: {escape_markdown(own)}." if own else "No licence was named for this model."
    if stated["base_model"]:
        text += (
            f" Licence of its base model: {escape_markdown(base)}."
            if base
            else (" The licence of its base model was not recorded: see the card of that model.")
        )
    return text


def _save(path: Path, content: str) -> None:
    """Whole or not at all, with line ends as they are."""
    partial = path.with_name(f"_{path.name}.partial")
    ModelCard(content).save(partial)
    partial.replace(path)
