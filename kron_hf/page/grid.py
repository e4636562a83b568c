"""The heatmaps of all layers: in groups that can be folded away, under a legend of their colours."""

import base64
from collections.abc import Mapping
from html import escape
from itertools import groupby

import torch

from kron_hf.escaping import plain
from kron_hf.page.layers import LayerPicture, draw_layer
from kron_hf.page.png import heatmap
from kron_hf.summary import KronSummary, LayerSummary

__all__ = ["draw_grid", "draw_legend"]

SHADES = 128
MAX_UNFOLDED = 24  # of more layers, which are screens on a phone, only the first group is unfolded


def draw_legend() -> str:
    """What blank, light and dark mean: one row of blocks whose norms grow."""
    norms = torch.linspace(0, 1, SHADES)[None]
    data = base64.b64encode(heatmap(norms, torch.ones_like(norms, dtype=torch.bool))).decode("ascii")
    return (
        '<p class="legend"><svg viewBox="0 0 16 16" aria-hidden="true"><rect class="zero" width="16" height="16"/>'
        "</svg>"
        f'exactly zero <svg class="ramp" viewBox="0 0 {SHADES} 16" aria-hidden="true"><image width="{SHADES}" '
        f'height="16" preserveAspectRatio="none" href="data:image/png;base64,{data}"/></svg>'
        "small to largest norm of a block in its layer</p>"
    )


def draw_grid(summary: KronSummary, pictures: Mapping[str, LayerPicture]) -> str:
    """The layers in their order, those of one stage of the network together.

    Args:
        summary: The layers.
        pictures: Their heatmaps, by name.
    """
    parts: list[str] = []
    for stage, group in groupby(summary.layers, key=lambda layer: _stage(layer.name)):
        layers = list(group)
        figures = "".join(draw_layer(layer, pictures.get(layer.name)) for layer in layers)
        unfolded = " open" if not parts or len(summary.layers) <= MAX_UNFOLDED else ""
        parts.append(
            f"<details{unfolded}><summary><b>{escape(plain(stage))}</b> {escape(_about(layers))}</summary>"
            f'<div class="grid">{figures}</div></details>'
        )
    return "".join(parts)


def _stage(name: str) -> str:
    """`vit.layers.0` of `vit.layers.0.mlp.fc1`: up to the first number, else all but the last part."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: first + 1])


def _about(layers: list[LayerSummary]) -> str:
    count = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    known = [f"{layer.sparsity:.2f}" for layer in layers if layer.sparsity is not None]
    ends = dict.fromkeys((min(known), max(known))) if known else ()
    return f"{count}, sparsity {' to '.join(ends)}" if ends else count
