"""The choice for every layer, drawn: its shape, its share of the parameters, its error. Needs matplotlib."""

from pathlib import Path
from typing import Any

from kron_hf.calibration.result import CalibrationResult
from kron_hf.escaping import plain

__all__ = ["draw"]

# Okabe and Ito's palette; the markers say the same to those who do not see the colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_NAMES = 100  # along the axis


def draw(result: CalibrationResult, path: str | Path) -> None:
    """Writes the picture; its ending says the format.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no layer.
    """
    if not result.layers:
        raise ValueError("there are no layers to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture of the calibration needs matplotlib: pip install 'kron_hf[demo]'") from error
    count = len(result.layers)
    figure: Any = Figure(figsize=(4 + 0.1 * min(count, MAX_NAMES), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    shares, errors = figure.subplots(2, sharex=True)
    held_out = any(layer.held_out_error is not None for layer in result.layers)
    for number, shape in enumerate(sorted({layer.shape for layer in result.layers})):
        chosen = [(index, layer) for index, layer in enumerate(result.layers) if layer.shape == shape]
        measured = [
            (index, layer.held_out_error if held_out and layer.block_size is not None else layer.error)
            for index, layer in chosen
        ]
        style = {
            "label": f"{shape} ({len(chosen)})",
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "none",
            "markersize": 4,
        }
        shares.plot(*zip(*((i, layer.option.params / layer.dense.params) for i, layer in chosen), strict=True), **style)
        errors.plot(*zip(*((i, error) for i, error in measured if error is not None), strict=True), **style)
    shares.set_ylabel("share of the layer's dense parameters")
    shares.set_yscale("log")
    shares.legend(title=f"{result.params / result.dense_params:.3g} of the parameters")
    errors.set_ylabel(f"relative output error{', held out' if held_out else ''}")
    errors.set_ylim(bottom=0)
    for axes in (shares, errors):
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    named = range(0, count, -(-count // MAX_NAMES))
    errors.set_xticks(named, [plain(result.layers[i].name) for i in named], rotation=90, fontsize=5)
    for label in errors.get_xticklabels():
        label.set_parse_math(False)  # a name may hold dollars
    figure.savefig(path)
