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
INCHES = 1.5  # of a mask: the picture is 900 pixels wide, of which cards show some 700
BARS, NAMES, TITLE = 1.3, 1.0, 0.4  # heights in inches


def draw_summary(summary: KronSummary) -> Any:
    """Two rows of bars, of sparsity and of parameters against dense, over the grid of masks.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There are no layers.
    """
    if not summary.layers:
        raise ValueError("there are no layers to draw")
    masks = dict(list(summary.masks.items())[-MAX_MASKS:])
    height = 2 * (TITLE + BARS) + NAMES + _grid_height(masks)
    figure = _figure((COLUMNS * INCHES, height))
    axes: list[Any] = []
    for number in (1, 2):
        bottom = height - number * (TITLE + BARS)
        axes.append(figure.add_axes((0.09, bottom / height, 0.89, BARS / height)))
    _draw_bars(axes[0], axes[1], summary)
    if masks:
        _draw_grid(figure, masks, summary)
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
    figure = _figure((COLUMNS * INCHES, _grid_height(masks)))
    _draw_grid(figure, masks, summary)
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


def _grid_height(masks: Mapping[str, Tensor]) -> float:
    return INCHES * -(-len(masks) // COLUMNS) + TITLE if masks else 0.0


def _draw_bars(bars: Any, counts: Any, summary: KronSummary) -> None:
    """Both from zero and linear, as the length of a bar is read as its value."""
    from matplotlib.ticker import EngFormatter

    layers, places = summary.layers, range(len(summary.layers))
    bars.bar(places, [layer.sparsity or 0.0 for layer in layers], color=BLUE)
    bars.set_ylim(0, 1)
    bars.set_title("sparsity", fontsize=9, loc="left")
    bars.set_xticks([])
    widths = {"width": 0.4, "edgecolor": "0.2", "linewidth": 0.3}
    dense, deployed = ([getattr(layer, name) for layer in layers] for name in ("dense_params", "deployed_params"))
    counts.bar([x - 0.2 for x in places], dense, color=ORANGE, hatch="//", label="dense", **widths)
    counts.bar([x + 0.2 for x in places], deployed, color=BLUE, label="deployed", **widths)
    counts.set_title("parameters", fontsize=9, loc="left")
    counts.yaxis.set_major_formatter(EngFormatter(sep=""))
    counts.legend(fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, frameon=False)
    named = range(0, len(layers), -(-len(layers) // MAX_NAMES))
    counts.set_xticks(named, [_label(layers[i].name) for i in named], rotation=90, fontsize=6)
    for label in counts.get_xticklabels():
        label.set_parse_math(False)  # a name may hold dollars
    for axes in (bars, counts):
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)


def _draw_grid(figure: Any, masks: Mapping[str, Tensor], summary: KronSummary) -> None:
    """At the bottom. Axes are placed by hand: matplotlib's layout engines take seconds over as many."""
    sizes = {layer.name: layer.block_size for layer in summary.layers if layer.block_size is not None}
    height = figure.get_figheight()
    top, cell = _grid_height(masks) - TITLE, INCHES / height
    left = "" if len(masks) == len(summary.masks) else f" (the last {len(masks)} of {len(summary.masks)})"
    title = f"Blocks of the weights{left}: dark = alive, light = exactly zero"
    figure.text(0.012, (top + 0.15) / height, title, fontsize=9)
    for index, (name, mask) in enumerate(masks.items()):
        row, column = divmod(index, COLUMNS)
        bottom = top / height - (row + 0.96) * cell
        axes = figure.add_axes(((column + 0.06) / COLUMNS, bottom, 0.88 / COLUMNS, 0.72 * cell))
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
        axes.set_title(f"{_label(name)}\nsparsity {share:.2f}", fontsize=7, pad=2, parse_math=False)
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
