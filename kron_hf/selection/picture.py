"""The paper's figure 3: the norm of every candidate over the steps of the selection. Needs matplotlib."""

from pathlib import Path
from typing import Any

from kron_hf.selection.result import SelectionResult

__all__ = ["draw"]

# Okabe and Ito's palette, with markers and line styles for those who do not see the colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", "-.", ":")
MARKS = 12  # on each line


def draw(result: SelectionResult, path: str | Path) -> None:
    """Writes the picture; its ending says the format.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: No norm was taken yet.
    """
    if not result.steps:
        raise ValueError("the selection has not begun: there are no norms to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture of the selection needs matplotlib: pip install 'kron_hf[demo]'") from error
    figure: Any = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, values) in enumerate(result.norms.items()):
        points = [(step, norm) for step, norm in zip(result.steps, values, strict=True) if norm is not None]
        axes.plot(
            *zip(*points, strict=True),
            label=label.replace("_", ", "),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=STYLES[number % len(STYLES)],
            markevery=max(1, len(result.steps) // MARKS),
            markersize=4,
        )
    for step in sorted({event["step"] for event in result.events}) if result.options.get("scope") == "global" else ():
        axes.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("norm of S, A and B together")
    axes.set_ylim(bottom=0)
    axes.legend(title="candidate")
    figure.savefig(path)
