"""The pictures of an experiment: told apart by colours that all can see, by markers and by lines."""

from pathlib import Path
from typing import Any

import torch

from examples.experiments.cells import Cell, Series
from examples.experiments.tables import dense_cell
from kron_hf.sparsity.masks import unpack_mask

__all__ = ["draw_masks", "draw_nonzeros", "draw_sparsity"]

# Okabe and Ito's colours.
STYLES: dict[str, dict[str, Any]] = {
    "Kronecker 1": {"color": "#56B4E9", "marker": "o", "linestyle": "-"},
    "Kronecker 2": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "Kronecker 4": {"color": "#009E73", "marker": "D", "linestyle": "-"},
    "group LASSO": {"color": "#E69F00", "marker": "^", "linestyle": "--"},
    "elastic group LASSO": {"color": "#F0E442", "marker": "v", "linestyle": "--"},
    "block RigL": {"color": "#D55E00", "marker": "P", "linestyle": ":"},
    "iterative pruning": {"color": "#CC79A7", "marker": "X", "linestyle": "-."},
    "gradual pruning": {"color": "#000000", "marker": "*", "linestyle": "-."},
}
VARIANTS = {"straight-through": ">", "group penalty": "h", ", l1": "p"}
SHOWN = 8.0  # points
BARS = {"capsize": 3, "markersize": 7, "markeredgecolor": "black", "markeredgewidth": 0.6, "linewidth": 1.4}


def draw_sparsity(cells: list[Cell], path: Path) -> None:
    """Test accuracy over block sparsity, a panel for each block size."""
    own = [cell for cell in cells if cell.case.table in ("sparsity", "l1") and cell.candidate.block_size is not None]
    blocks = sorted({cell.candidate.block_size for cell in own if cell.candidate.block_size is not None})
    figure = _figure(max(4.4 * len(blocks), 8), 5)
    all_axes = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for axes, block in zip(all_axes, blocks, strict=True):
        lines: dict[Series, list[Cell]] = {}
        for cell in own:
            if cell.candidate.block_size == block:
                lines.setdefault(cell.series, []).append(cell)
        for series, line in lines.items():
            _draw_line(axes, line, "sparsity", label=_label(series), **_style(series))
        _draw_dense(axes, cells)
        axes.set(title="blocks {} x {}".format(*block), xlabel="block sparsity")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("test accuracy, %")
    _legend(figure, all_axes)
    figure.savefig(path, dpi=100)


def draw_nonzeros(cells: list[Cell], path: Path) -> None:
    """Test accuracy over the nonzeros of the compared layers, and over the parameters that were trained for them."""
    figure = _figure(10, 5)
    panels = figure.subplots(1, 2, sharey=True)
    keys = ("converted_nonzeros", "converted_trained_params")
    for axes, key, label in zip(panels, keys, ("nonzeros at the end", "parameters trained"), strict=True):
        kinds: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.candidate.method != "dense":
                kinds.setdefault(_kind(cell.series), []).append(cell)
        for kind, members in kinds.items():
            style = {**STYLES[kind], "linestyle": "none"}
            _draw_line(axes, members, key, label=kind.replace("Kronecker ", "Kronecker, rank "), **style)
        _draw_dense(axes, cells)
        axes.set(xlabel=f"{label}, compared layers", xscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("test accuracy, %")
    _leave_out_below(panels[0], cells)
    _legend(figure, panels)
    figure.savefig(path, dpi=100)


def draw_masks(row: dict[str, Any], path: Path) -> None:
    """The masks that a row keeps, each in the shape of its weight: dark blocks are alive, light ones exactly zero."""
    masks = {
        name: unpack_mask(kept["alive"], torch.empty(kept["shape"])).float().numpy()
        for name, kept in row["masks"].items()
    }
    columns = min(6, len(masks))
    lines = -(-len(masks) // columns)
    figure = _figure(2.6 * columns, 2.6 * lines)
    for index, (name, mask) in enumerate(masks.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.imshow(mask, cmap="Blues", vmin=-0.15, vmax=1.2, interpolation="nearest", aspect="auto")
        axes.set_title(
            f"{_short(name)}\n{mask.shape[0]} x {mask.shape[1]} blocks, {1 - mask.mean():.0%} zero", fontsize=7
        )
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=100)


def _leave_out_below(axes: Any, cells: list[Cell]) -> None:
    """Ends the axis `SHOWN` points below dense, and says in words what lies lower."""
    dense = dense_cell(cells)
    floor = None if dense is None else dense.accuracy[0] - SHOWN
    lower = [cell for cell in cells if floor is not None and cell.accuracy[0] < floor]
    if floor is None or not lower:
        return
    axes.set_ylim(bottom=floor)
    names = {f"{cell.series[0]} {cell.accuracy[0]:.1f}": None for cell in lower}
    axes.set_title(f"below: {', '.join(names)}", fontsize=7, loc="left")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Any, panels: Any) -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)


def _draw_line(axes: Any, cells: list[Cell], key: str, **style: Any) -> None:
    ordered = sorted(cells, key=lambda cell: cell.mean(key))
    means, deviations = zip(*(cell.accuracy for cell in ordered), strict=True)
    axes.errorbar([cell.mean(key) for cell in ordered], means, yerr=deviations, **BARS, **style)


def _draw_dense(axes: Any, cells: list[Cell]) -> None:
    dense = dense_cell(cells)
    if dense is not None:
        middle, deviation = dense.accuracy
        axes.axhline(middle, color="black", linewidth=1, label="dense")
        axes.axhspan(middle - deviation, middle + deviation, color="black", alpha=0.1)


def _kind(series: Series) -> str:
    method, _, rank = series
    return method if rank is None else f"Kronecker {rank}"


def _style(series: Series) -> dict[str, Any]:
    style = STYLES[_kind(series)]
    markers = [marker for name, marker in VARIANTS.items() if name in series[0]]
    return {**style, "marker": markers[0], "markerfacecolor": "white", "linestyle": ":"} if markers else style


def _label(series: Series) -> str:
    method, _, rank = series
    return method if rank is None else f"{method}, rank {rank}"


def _short(name: str) -> str:
    """`vit.vit.layers.0.mlp.fc1` as `0 fc1`."""
    parts = name.split(".")
    return " ".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]])
