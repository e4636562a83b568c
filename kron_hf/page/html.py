"""The page as a whole.

Nothing is loaded from anywhere: pictures are data, the style is in the page, and the policy in its head forbids all
else, scripts too. Whatever comes from a checkpoint is printable and escaped.
"""

import base64
import hashlib
from collections.abc import Mapping
from html import escape

from kron_hf.escaping import plain
from kron_hf.page.curves import draw_charts
from kron_hf.page.grid import draw_grid, draw_legend
from kron_hf.page.layers import LayerPicture, layer_table
from kron_hf.page.style import STYLE
from kron_hf.summary import KronSummary
from kron_hf.training_history import Curves

__all__ = ["build_page"]


def build_page(name: str, kind: str, summary: KronSummary, pictures: Mapping[str, LayerPicture], curves: Curves) -> str:
    """The page of a model.

    Args:
        name: What the model is called.
        kind: Its class.
        summary: Its layers.
        pictures: Their heatmaps, by name.
        curves: What its training logged; {} if that is not known.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = escape(plain(name))
    charts = "".join(draw_charts(curves))
    training = f'<h2>Training</h2><div class="grid">{charts}</div>' if charts else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="referrer" content="no-referrer"><title>{title}</title><style>{STYLE}</style></head><body>\n'
        f"<h1>{title}</h1><p>{escape(plain(kind))} with {len(summary.layers)} Kronecker layers, "
        "W = sum of (S * A) (x) B: a zero of S makes a whole block of W zero.</p>"
        f'<div class="totals">{_totals(summary)}</div>\n'
        f"{training}\n"
        "<h2>Layers</h2><p>Each picture is a weight, out by in, with a cell for each block. Parameters are those "
        "deployed, with S folded into A.</p>"
        f"{draw_legend()}{draw_grid(summary, pictures)}\n"
        f"<h2>Numbers</h2>{layer_table(summary)}"
        "<p>A multiply-add is 2 FLOPs. No kernel skips single zero blocks. Deployed: S folded into A.</p>"
        "</body></html>\n"
    )


def _totals(summary: KronSummary) -> str:
    converted = summary.converted
    sparsity = "-" if summary.sparsity is None else f"{summary.sparsity:.2%}"
    facts = [
        (sparsity, "of the converted weights in zero blocks"),
        (f"{summary.deployed_params:,}", f"parameters deployed, dense {summary.dense_params:,}"),
        (_ratio(converted.deployed_params, converted.dense_params), "of the converted layers' dense parameters"),
        (_ratio(converted.forward_flops, converted.dense_forward_flops), "of their dense FLOPs a token"),
    ]
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in facts)


def _ratio(count: int, whole: int) -> str:
    return f"{count / whole:.3f}" if whole else "-"
