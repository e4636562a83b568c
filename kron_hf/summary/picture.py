"""A summary drawn: sparsity and parameters of every layer, and the masks. Needs matplotlib."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from kron_hf.escaping import plain
from kron_hf.summary.table import KronSummary

__all__ = ["draw_masks", "draw_summary"]

# Okabe and Ito's palette; hatches say the same to those who do not see the colours.
BLUE, ORANGE = "#0072B2", "#E69F00"
MAX_NAMES = 60  # along an axis
MAX_MASKS = 48  # in one picture: those of the last layers
MAX_CELLS = 256  # of a mask, along a side
COLUMNS = 6
INCHES = 1.9  # of a mask


def draw_summary(summary: KronSummary) -> Any:
    """Two rows of bars, of sparsity and of parameters against dense, over the grid of masks.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There are no layers.
    """
    if not summary.layers:
        raise ValueError("there are no layers to draw")
    masks = dict(list(summary.masks.items())[-MAX_MASKS:])
    rows = -(-len(masks) // COLUMNS)
    heights = (2.0, 2.6, INCHES * rows + 0.4)
    figure = _figure((COLUMNS * INCHES, sum(heights) + 1.0))
    total = sum(heights) + 1.0
    bars = figure.add_axes((0.09, 1 - 2.0 / total, 0.89, 1.6 / total))
    counts = figure.add_axes((0.09, 1 - 4.0 / total, 0.89, 1.6 / total))
    _draw_bars(bars, counts, summary)
    _draw_grid(figure, masks, _sizes(summary), top=1 - 5.4 / total, height=INCHES * rows / total)
    return figure


def draw_masks(summary: KronSummary) -> Any:
    """The masks alone, in the shape of their weights: dark blocks are alive, light ones exactly zero.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There are no masks.
    """
    masks = dict(list(summary.masks.items())[-MAX_MASKS:])
    if not masks:
        raise ValueError("there are no masks to draw")
    rows = -(-len(masks) // COLUMNS)
    height = INCHES * rows + 0.4
    figure = _figure((COLUMNS * INCHES, height))
    left = "" if len(masks) == len(summary.masks) else f" (the last {len(masks)} of {len(summary.masks)})"
    title = f"Blocks of the weights{left}: dark = alive, light = exactly zero"
    figure.text(0.02, 1 - 0.25 / height, title, fontsize=9)
    _draw_grid(figure, masks, _sizes(summary), top=1 - 0.4 / height, height=INCHES * rows / height)
    return figure


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture of the layers needs matplotlib: pip install 'kron_hf[demo]'") from error
    figure: Any = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def _sizes(summary: KronSummary) -> dict[str, tuple[int, int]]:
    return {layer.name: layer.block_size for layer in summary.layers if layer.block_size is not None}


def _draw_bars(bars: Any, counts: Any, summary: KronSummary) -> None:
    layers, places = summary.layers, range(len(summary.layers))
    bars.bar(places, [layer.sparsity or 0.0 for layer in layers], color=BLUE)
    bars.set_ylim(0, 1)
    bars.set_ylabel("sparsity")
    bars.set_xticks([])
    widths = {"width": 0.4, "edgecolor": "0.2", "linewidth": 0.3}
    dense, deployed = ([getattr(layer, name) for layer in layers] for name in ("dense_params", "deployed_params"))
    counts.bar([x - 0.2 for x in places], dense, color=ORANGE, hatch="//", label="dense", **widths)
    counts.bar([x + 0.2 for x in places], deployed, color=BLUE, label="deployed", **widths)
    counts.set_yscale("log")
    counts.set_ylabel("parameters")
    counts.legend(fontsize=7)
    named = range(0, len(layers), -(-len(layers) // MAX_NAMES))
    counts.set_xticks(named, [_label(layers[i].name) for i in named], rotation=90, fontsize=6)
    for label in counts.get_xticklabels():
        label.set_parse_math(False)  # a name may hold dollars
    for axes in (bars, counts):
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)


def _draw_grid(
    figure: Any, masks: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], *, top: float, height: float
) -> None:
    """Axes are placed by hand: matplotlib's layout engines take seconds over as many."""
    rows = -(-len(masks) // COLUMNS) or 1
    cell, wide = height / rows, 1 / COLUMNS
    for index, (name, mask) in enumerate(masks.items()):
        row, column = divmod(index, COLUMNS)
        place = ((column + 0.06) * wide, top - (row + 0.98) * cell, 0.88 * wide, 0.78 * cell)
        axes = figure.add_axes(place)
        block_out, block_in = sizes[name]
        ratio = block_out * mask.shape[0] / (block_in * mask.shape[1])  # height over width of the weight
        shown = _shrunk(mask)
        axes.imshow(
            shown,
            cmap="Blues",
            vmin=-0.15,
            vmax=1.2,
            interpolation="nearest",
            aspect=ratio * shown.shape[1] / shown.shape[0],
        )
        share = 1 - mask.float().mean().item()
        axes.set_title(f"{_label(name)}\nsparsity {share:.2f}", fontsize=6, pad=2, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])


def _shrunk(mask: Tensor) -> Any:
    """At most `MAX_CELLS` a side; a cell is blank only where all of its blocks are zero."""
    size = [min(side, MAX_CELLS) for side in mask.shape]
    picture = mask.float()
    return (picture if size == list(mask.shape) else adaptive_max_pool2d(picture[None], size)[0]).numpy()


def _label(name: str) -> str:
    """`vit.layers.0.mlp.fc1` as `0 fc1`, to fit over its picture."""
    parts = name.split(".")
    return plain(" ".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]]))
