"""The part of a card that is counted: `kron-hf verify` counts again, writes it again and compares."""

from collections.abc import Mapping, Sequence
from typing import Any

from kron_hf.claims import FileClaim, MetricClaim
from kron_hf.claims.files import is_weights
from kron_hf.model_card.markdown import escape_markdown, fenced, table
from kron_hf.summary import KronSummary

__all__ = ["figures_section", "find_figures"]

BEGIN, END = "<!-- kron_hf: figures -->", "<!-- /kron_hf: figures -->"


def figures_section(
    summary: KronSummary, whole: Mapping[str, Any], files: Mapping[str, FileClaim], metrics: Sequence[MetricClaim]
) -> str:
    """The figures of a model as Markdown, between two comments.

    Args:
        summary: Its layers.
        whole: Its figures, as `kron_hf.claims.count` gives them.
        files: Its files; those with weights are shown.
        metrics: What was measured.
    """
    parts = [BEGIN, *_measured(metrics), table(("", "this model", "dense", "ratio"), _rows(whole)), *_files(files)]
    parts += ["Layer by layer:", fenced(str(summary), "text"), END]
    return "\n\n".join(parts)


def find_figures(card: str) -> str | None:
    """That part of a card; None if it is not there exactly once."""
    if card.count(BEGIN) != 1 or card.count(END) != 1:
        return None
    begin, end = card.index(BEGIN), card.index(END)
    return card[begin : end + len(END)] if begin < end else None


def _measured(metrics: Sequence[MetricClaim]) -> list[str]:
    parts: list[str] = []
    for where in dict.fromkeys((metric.dataset, metric.split) for metric in metrics):
        dataset, split = map(escape_markdown, where)
        rows = [
            (escape_markdown(metric.metric), f"{metric.value:.4f}")
            for metric in metrics
            if (metric.dataset, metric.split) == where
        ]
        parts += [f"Measured on {dataset}{f' ({split} images)' if split else ''}:", table(("metric", "value"), rows)]
    return parts


def _rows(whole: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sparsity = whole["sparsity"]
    rows = [("block sparsity of the converted weights", "-" if sparsity is None else f"{sparsity:.4f}", "0", "")]
    rows += [
        _row("total parameters, as stored", whole["total_params"], whole["dense_params"]),
        _row("trained parameters", whole["trained_params"], whole["dense_params"]),
        _row("parameters outside of zero blocks", whole["nonzeros"], whole["dense_params"]),
        _row("deployed parameters (S folded into A)", whole["deployed_params"], whole["dense_params"]),
        _row("of the converted layers", whole["converted_deployed_params"], whole["converted_dense_params"]),
        _row("FLOPs a token, converted layers", whole["forward_flops"], whole["dense_forward_flops"]),
    ]
    if "image_flops" in whole:
        rows.append(_row("FLOPs an image, whole model", whole["image_flops"], whole["dense_image_flops"]))
    return rows


def _row(label: str, count: int | None, dense: int) -> tuple[str, ...]:
    if count is None:
        return label, "-", f"{dense:,}", ""
    return label, f"{count:,}", f"{dense:,}", f"{count / dense:.3f}" if dense else ""


def _files(files: Mapping[str, FileClaim]) -> list[str]:
    rows = [
        (escape_markdown(name), f"{claim.bytes:,}", f"`{claim.sha256}`")
        for name, claim in sorted(files.items())
        if is_weights(name)
    ]
    return [table(("weights", "bytes", "SHA-256"), rows)] if rows else []
