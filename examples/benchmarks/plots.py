"""The pictures of the benchmarks: told apart by colours that all can see, by markers and by lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.benchmarks.cases import Case

__all__ = ["draw_over_sizes", "draw_roofline"]

# Okabe and Ito's colours, and grey.
STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": "#000000", "marker": "X", "linestyle": ":"},
    {"color": "#7F7F7F", "marker": "<", "linestyle": "-."},
]
METHODS = {"dense": ("black", "*"), "kron": ("#0072B2", "o"), "vec-parallel": ("#D55E00", "s"), "bsr": ("#009E73", "^")}
SHOWN = (768, 768)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10)  # ticks

Rows = list[dict[str, Any]]


def draw_over_sizes(rows: Rows, path: Path, features: tuple[int, int] = SHOWN) -> None:
    """Time and peak memory of one layer over dense: over the rank, a line for each block size, and the reverse.

    Nothing is drawn if the layer was not measured.
    """
    points: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        case = Case.from_row(row)
        plain = case.method == "kron" and case.subject == "layer" and not case.sparsity
        if plain and case.features == features and "both_ms" in row:
            assert case.block_size is not None
            assert case.rank is not None
            if case.block_size[0] == case.block_size[1]:
                points[case.block_size[0], case.rank] = row
    if not points:
        return
    figure = _figure(11, 8)
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    for axes_row, what, label in zip(panels, ("both_ms", "peak_bytes"), ("time", "peak memory"), strict=True):
        for axes, by_block in zip(axes_row, (True, False), strict=True):
            _draw_lines(axes, points, what, by_block)
            axes.axhline(1, color="black", linewidth=1)
            axes.grid(alpha=0.3, which="both")
        axes_row[0].set_ylabel(f"{label} of a training pass over dense")
    for axes, label in zip(panels[1], ("rank", "block size"), strict=True):
        axes.set_xlabel(label)
    for axes in panels[0]:
        axes.legend(fontsize=8)
    figure.suptitle(f"{features[0]} -> {features[1]}, forward + backward; dense is 1\n{_conditions(rows[0])}")
    figure.savefig(path, dpi=100)


def _draw_lines(axes: Any, points: Mapping[tuple[int, int], Mapping[str, Any]], what: str, by_block: bool) -> None:
    series: dict[int, list[tuple[int, float]]] = {}
    for (block, rank), row in sorted(points.items()):
        line, at = (block, rank) if by_block else (rank, block)
        if row.get(what) and row.get(f"dense_{what}"):
            series.setdefault(line, []).append((at, row[what] / row[f"dense_{what}"]))
    for style, (line, values) in zip(STYLES * 2, sorted(series.items()), strict=False):
        label = f"blocks {line} x {line}" if by_block else f"rank {line}"
        axes.plot(*zip(*sorted(values), strict=True), label=label, markersize=6, **style)
    from matplotlib.ticker import FormatStrFormatter

    axes.set(xscale="log", yscale="log")  # before the ticks, which it would replace
    axes.minorticks_off()
    ticks = sorted({at for values in series.values() for at, _ in values})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    ratios = [ratio for values in series.values() for _, ratio in values]
    axes.set_yticks([tick for tick in RATIOS if min(ratios) / 1.1 < tick < max(ratios) * 1.1])
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def draw_roofline(rows: Rows, roof: Mapping[str, float], path: Path) -> None:
    """FLOP/s of the forward of single linears over FLOPs a byte, below what the machine can do at most.

    Bytes are those that no way can avoid: input, output and parameters once. Nothing is drawn without layers.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for row in rows:
        case = Case.from_row(row)
        if case.features and case.subject == "layer" and "forward_flops" in row:
            if case.method in found:
                found[case.method].append(_point(row, case.features, ""))
            found["dense"].append(_point(row, case.features, "dense_"))
    everywhere = [intensity for points in found.values() for intensity, _ in points]
    if not everywhere:
        return
    figure = _figure(8, 6)
    axes = figure.subplots()
    for name, points in found.items():
        if points:
            color, marker = METHODS[name]
            axes.plot(*zip(*points, strict=True), marker, color=color, label=name, linestyle="none", alpha=0.7)
    ends = [min(everywhere) / 2, max(everywhere) * 2]
    middle = roof["flops_per_second"] / roof["bytes_per_second"]
    xs = sorted({*ends, min(max(middle, ends[0]), ends[1])})
    ys = [min(roof["flops_per_second"], x * roof["bytes_per_second"]) for x in xs]
    axes.plot(xs, ys, color="black", label="roof: large product, large copy")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s, forward")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    axes.set_title(_conditions(rows[0]), fontsize=10)
    figure.savefig(path, dpi=100)


def _conditions(row: Mapping[str, Any]) -> str:
    """What all rows of a picture were measured under."""
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    return f"{row['machine']}{threads}, {row['dtype']}, {row['tokens']:,} tokens"


def _point(row: Mapping[str, Any], features: tuple[int, int], prefix: str) -> tuple[float, float]:
    itemsize = 4 if row["dtype"] == "float32" else 2
    moved = itemsize * (row["tokens"] * sum(features) + row[f"{prefix}trained_params"])
    flops = min(row[f"{prefix}forward_flops"], row["dense_forward_flops"])  # W is built where the factors take more
    return flops / moved, flops / (row[f"{prefix}forward_ms"] / 1e3)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
