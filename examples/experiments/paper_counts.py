"""Parameters, nonzeros and FLOPs of the paper's models, dense and Kronecker, beside the figures that it prints.

From the configs alone, on the meta device: nothing is downloaded and nothing computed.

python -m examples.experiments.paper_counts [--output examples/results/paper_counts.json]
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from examples.experiments.paper_readings import PUBLISHED, Published, Reading, Trace, fits, readings, trace
from kron_hf import KronConfig, get_kron_model, kron_summary, model_flops
from kron_hf.targets import find_targets

RESULTS = Path("examples/results/paper_counts.json")
RANKS = (1, 2, 4)
BLOCKS = {"ViT-tiny": (2, 4, 8), "Swin-tiny": (4,), "ViT-base": (4,)}
PAPER_BLOCK = 4
EAGER = {"attn_implementation": "eager"}  # gives back attention's softmax, which some counters count


def vit_tiny(labels: int) -> PreTrainedModel:
    """12 layers, hidden size 192, 3 heads, patches of 16, images of 224."""
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=labels, **EAGER)
    return ViTForImageClassification(config)


def swin_tiny(labels: int) -> PreTrainedModel:
    """Stages of 2, 2, 6 and 2 layers, 96 channels at first, windows of 7, images of 224."""
    return SwinForImageClassification(SwinConfig(num_labels=labels, **EAGER))


def vit_base(labels: int) -> PreTrainedModel:
    """12 layers, hidden size 768, 12 heads, patches of 16, images of 224."""
    return ViTForImageClassification(ViTConfig(num_labels=labels, **EAGER))


def distilled_vit_base(labels: int) -> PreTrainedModel:
    """ViT-base with a distillation token and a head for it (DeiT)."""
    return DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=labels, **EAGER))


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "ViT-tiny": vit_tiny,
    "Swin-tiny": swin_tiny,
    "ViT-base": vit_base,
}


def main() -> None:
    """Counts, prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    counts = [count_row(*setting) for setting in settings()]
    comparisons = compare(counts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"counts": counts, "published": comparisons}, indent=1) + "\n")
    print(counts_table(counts))
    print()
    print("\n\n".join(explanation(comparison) for comparison in comparisons))


def settings() -> Iterator[tuple[str, int | None, int | None]]:
    """What is counted: the name of a model, its block size and its rank; None and None is dense."""
    for name in MODELS:
        yield name, None, None
        yield from ((name, block, rank) for block in BLOCKS[name] for rank in RANKS)


def count_row(name: str, block_size: int | None, rank: int | None) -> dict[str, Any]:
    """Our counts of one model with 100 classes."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These modules need as many FLOPs")  # 2 x 2 at rank 4: the table says so
        model = MODELS[name](100)
        if block_size is not None and rank is not None:
            model = get_kron_model(model, KronConfig(block_size=block_size, rank=rank))
    size = model.config.image_size  # pyright: ignore[reportAttributeAccessIssue]
    flops = model_flops(model, torch.empty(1, 3, size, size))
    summary = kron_summary(model)
    in_s_and_a = sum(
        layer.dense_forward_flops // 2 // (layer.block_size[0] * layer.block_size[1]) * (1 + layer.rank)
        for layer in summary.layers
        if layer.block_size and layer.rank
    )
    return {
        "model": name,
        "block_size": block_size,
        "rank": rank,
        "trained_params": summary.trained_params,
        "nonzeros_at_50": summary.trained_params - in_s_and_a // 2,
        "deployed_params": summary.deployed_params,
        "dense_params": summary.dense_params,
        "converted_of_dense": summary.converted.shares_of_dense()["trained_params"],
        "forward_flops": flops.forward,
        "training_flops": flops.training,
    }


def compare(counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every published figure with our count in the paper's setting and with the readings that give it."""
    traces = {name: traces_of(name) for name in MODELS}
    return [_comparison(published, counts, traces[published.model]) for published in PUBLISHED]


def traces_of(name: str) -> list[Trace]:
    """The dense model with 100 and with 1,000 classes, and what else goes by its name."""
    builds = [(f"{labels} classes", MODELS[name], labels) for labels in (100, 1000)]
    if name == "ViT-base":
        builds += [(f"distilled, two heads of {labels} classes", distilled_vit_base, labels) for labels in (100, 1000)]
    traces = []
    for words, build, labels in builds:
        with torch.device("meta"):
            model = build(labels)
        projections = {target.name for target in find_targets(model, KronConfig(block_size=4, rank=1))}
        traces.append(trace(model, words, projections))
    return traces


def _comparison(published: Published, counts: list[dict[str, Any]], traces: list[Trace]) -> dict[str, Any]:
    dense = published.what.startswith("dense")
    key = "training_flops" if published.what.endswith("FLOPs") else "trained_params"
    own = {
        row["rank"]: row[key]
        for row in counts
        if row["model"] == published.model and row["block_size"] == (None if dense else PAPER_BLOCK)
    }
    forwards = {
        row["rank"]: row["forward_flops"]
        for row in counts
        if row["model"] == published.model and row["block_size"] in (None, PAPER_BLOCK)
    }
    tried = readings(published.what, traces)
    matches = [reading for reading in tried if fits(published, reading.count)]
    return {
        **published._asdict(),
        "ours": {"dense" if rank is None else f"rank {rank}": count for rank, count in own.items()},
        "our_forward_flops": _parts(forwards[None if dense else 1], traces[0], dense)
        if "FLOPs" in published.what
        else None,
        "readings_tried": len(tried),
        "readings_that_fit": [reading._asdict() for reading in matches],
        "nearest_other": _nearest(published, tried, matches)._asdict(),
    }


def _parts(forward: int, seen: Trace, dense: bool) -> dict[str, int]:
    """Of what a forward of ours consists, dense or at rank 1."""
    projections = sum(2 * each.tokens * each.out_features * each.in_features for each in seen.chosen(False))
    parts = {
        "attention's products": seen.attention,
        "convolution": seen.convolution,
        "other linears": seen.linear_flops - projections,
    }
    name = "projections" if dense else "Kronecker layers at rank 1"
    return {name: forward - sum(parts.values()), **parts}


def _nearest(published: Published, tried: list[Reading], matches: list[Reading]) -> Reading:
    value = float(published.printed[:-1]) * {"M": 1e6, "G": 1e9}[published.printed[-1]]
    return min((r for r in tried if r not in matches), key=lambda reading: abs(reading.count - value))


def counts_table(rows: list[dict[str, Any]]) -> str:
    """Our counts, a line for each model."""
    header = ["model", "block", "rank", "trained", "nonzeros at 50 %", "deployed", "converted of dense"]
    header += ["forward FLOPs an image", "training FLOPs an image"]
    lines = [header]
    for row in rows:
        share = row["converted_of_dense"]
        lines.append(
            [
                row["model"],
                "dense" if row["block_size"] is None else f"{row['block_size']} x {row['block_size']}",
                "" if row["rank"] is None else str(row["rank"]),
                *(f"{row[key]:,}" for key in ("trained_params", "nonzeros_at_50", "deployed_params")),
                "" if share is None else f"{share:.3f}",
                *(f"{row[key] / 1e9:.3f}G" for key in ("forward_flops", "training_flops")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def explanation(comparison: dict[str, Any]) -> str:
    """One published figure in words."""
    printed, unit = comparison["printed"], {"M": 1e6, "G": 1e9}[comparison["printed"][-1]]
    value = float(printed[:-1]) * unit
    ours = ", ".join(
        f"{setting} {count / unit:,.3f}{printed[-1]} ({count / value:.2f} x)"
        for setting, count in comparison["ours"].items()
    )
    matches, parts = comparison["readings_that_fit"], comparison["our_forward_flops"]
    lines = [f"{comparison['model']}, {comparison['what']}: published {printed}; ours: {ours}"]
    if parts:
        shares = ", ".join(f"{name} {flops / 1e9:.3f}G" for name, flops in parts.items())
        lines.append(f"  our forward: {shares}; training is 3 x that, but for the gradient of the image")
    lines.append(f"  {len(matches)} of {comparison['readings_tried']} ways of counting give {printed}:")
    lines += [f"    {match['count']:>14,}  {match['words']}" for match in matches]
    nearest = comparison["nearest_other"]
    lines.append(f"  nearest other: {nearest['count']:,}, {nearest['words']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
