"""The training drawn: loss, sparsity and what was measured, over the steps. Needs matplotlib."""

from typing import Any

from kron_hf.escaping import plain
from kron_hf.training_history import Curves

__all__ = ["draw_curves"]

# Okabe and Ito's palette, with markers and line styles for those who do not see the colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", "-.", ":")
MARKS = 12  # on each line


def draw_curves(curves: Curves) -> Any:
    """Two axes: losses above, shares such as sparsity and accuracy below; learning rates and norms are left out.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is neither.
    """
    losses = {name: points for name, points in curves.items() if name.endswith("loss")}
    shares = {
        name: points
        for name, points in curves.items()
        if name not in losses and (name == "sparsity" or name.startswith("eval_"))
    }
    groups = [(label, group) for label, group in (("loss", losses), ("share", shares)) if group]
    if not groups:
        raise ValueError("there are no curves to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("training curves need matplotlib: pip install 'kron_hf[demo]'") from error
    figure: Any = Figure(figsize=(6.4, 0.6 + 2.2 * len(groups)))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.1, right=0.98, top=1 - 0.15 / figure.get_figheight())
    axes: Any = None
    for axes, (label, group) in zip(
        figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0], groups, strict=True
    ):
        for number, (name, points) in enumerate(group.items()):
            axes.plot(
                *zip(*points, strict=True),
                label=plain(name).replace("_", " ").replace("$", r"\$"),
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=STYLES[number % len(STYLES)],
                markevery=max(1, len(points) // MARKS),
                markersize=4,
            )
        axes.set_ylabel(label)
        axes.grid(color="0.9", linewidth=0.8)
        axes.legend(fontsize=7)
    axes.set_xlabel("optimizer step")
    return figure
