"""A layer on the page: its heatmap and its numbers."""

import base64
from dataclasses import dataclass
from html import escape

import torch
from torch import nn

from kron_hf.escaping import plain
from kron_hf.factors import block_norms
from kron_hf.kron_layer import KronLayer
from kron_hf.page.png import MAX_CELLS, heatmap
from kron_hf.selection.candidates import converted_layers
from kron_hf.summary import KronSummary, LayerSummary

__all__ = ["LayerPicture", "draw_layer", "layer_pictures", "layer_table"]

STRETCH = 4  # a weight is drawn at most so many times as wide as high, or the reverse


@dataclass(frozen=True)
class LayerPicture:
    """The heatmap of a layer and what it shows.

    Attributes:
        png: The picture.
        shape: `(out, in)`, of a convolution its channels.
        blocks: `(O, I)`.
        norm: Frobenius norm of W.
        norms: Smallest and largest norm of a living block.
    """

    png: bytes
    shape: tuple[int, int]
    blocks: tuple[int, int]
    norm: float
    norms: tuple[float, float]


@torch.no_grad()
def layer_pictures(model: nn.Module) -> dict[str, LayerPicture]:
    """Pictures of the Kronecker layers by name; not of layers whose block size is being selected."""
    layers = converted_layers(model).items()
    return {name: _picture(layer) for name, layer in layers if isinstance(layer, KronLayer)}


def draw_layer(layer: LayerSummary, picture: LayerPicture | None) -> str:
    """A `<figure>` of the grid."""
    facts = [*_sizes(layer), *_costs(layer), *(_norms(picture) if picture else [])]
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in facts)
    image = "" if picture is None else _image(layer.name, picture)
    return f"<figure><figcaption><b>{escape(plain(layer.name))}</b></figcaption>{image}<dl>{rows}</dl></figure>"


def layer_table(summary: KronSummary) -> str:
    """All layers as rows."""
    header = ("module", "block", "rank", "sparsity", "stored", "deployed", "dense", "FLOPs/token", "of dense")
    head = "".join(f'<th scope="col">{label}</th>' for label in header)
    rows = "".join(map(_table_row, summary.layers))
    return (
        '<div class="wide" role="region" tabindex="0" aria-label="All layers"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody><tfoot>{_table_row(summary.converted)}</tfoot></table></div>"
    )


def _picture(layer: KronLayer) -> LayerPicture:
    layer = layer.cpu()
    alive = layer.block_mask
    norms = block_norms(layer.masked_s().float(), layer.a.float(), layer.b.float())
    living = norms[alive]
    return LayerPicture(
        png=heatmap(norms, alive),
        shape=(layer.weight_shape[0], layer.weight_shape[1]),
        blocks=(layer.out_blocks, layer.in_blocks),
        norm=norms.square().sum().sqrt().item(),
        norms=(living.min().item(), living.max().item()) if len(living) else (0.0, 0.0),
    )


def _image(name: str, picture: LayerPicture) -> str:
    height, width = picture.shape
    height, width = max(height, width // STRETCH), max(width, height // STRETCH)
    data = base64.b64encode(picture.png).decode("ascii")
    label = escape(f"blocks of {plain(name)}")
    note = ""
    if max(picture.blocks) > MAX_CELLS:
        note = "<figcaption>A dot stands for several blocks; it is blank where all of them are zero.</figcaption>"
    return (
        f'<svg class="mask" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<rect class="zero" width="{width}" height="{height}"/>'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" image-rendering="pixelated" '
        f'href="data:image/png;base64,{data}"/></svg>{note}'
    )


def _sizes(layer: LayerSummary) -> list[tuple[str, str]]:
    size = layer.block_size
    kernel = [("kernel", " x ".join(map(str, layer.kernel_size)))] if layer.kernel_size else []
    return [
        *kernel,
        ("block, rank", "being selected" if size is None else f"{size[0]} x {size[1]}, {layer.rank}"),
        ("sparsity", _share(layer.sparsity)),
    ]


def _costs(layer: LayerSummary) -> list[tuple[str, str]]:
    shares = layer.shares_of_dense()
    unit = "position" if layer.kernel_size else "token"
    return [
        ("parameters", f"{layer.deployed_params:,} ({_share(shares['deployed_params'])} of dense)"),
        (f"FLOPs a {unit}", f"{layer.forward_flops:,} ({_share(shares['forward_flops'])} of dense)"),
    ]


def _norms(picture: LayerPicture) -> list[tuple[str, str]]:
    low, high = picture.norms
    return [
        ("weight, out x in", f"{picture.shape[0]} x {picture.shape[1]}"),
        ("norm of W", f"{picture.norm:.4g}"),
        ("norms of blocks", f"{low:.3g} to {high:.3g}"),
    ]


def _table_row(layer: LayerSummary) -> str:
    name, *cells = map(escape, _row(layer))
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _row(layer: LayerSummary) -> tuple[str, ...]:
    size = layer.block_size
    return (
        plain(layer.name),
        "" if size is None else f"{size[0]} x {size[1]}",
        "" if layer.rank is None else str(layer.rank),
        _share(layer.sparsity),
        f"{layer.trained_params:,}",
        f"{layer.deployed_params:,}",
        f"{layer.dense_params:,}",
        f"{layer.forward_flops:,}",
        _share(layer.shares_of_dense()["forward_flops"]),
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
