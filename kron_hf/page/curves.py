"""Training curves as SVG: one small chart a figure, drawn with the colours of the page."""

import math
from html import escape

from kron_hf.escaping import plain
from kron_hf.training_history import Curves

__all__ = ["draw_charts"]

WIDTH, HEIGHT = 300, 140
LEFT, RIGHT, TOP, BOTTOM = 60, 8, 10, 24
DOTS = 40  # as many points or fewer get a dot each


def draw_charts(curves: Curves) -> list[str]:
    """A `<figure>` for each curve, in the order of their names but losses and sparsity first."""
    first = {"loss": 0, "eval_loss": 1, "sparsity": 2, "eval_accuracy": 3}
    return [_chart(name, curves[name]) for name in sorted(curves, key=lambda name: (first.get(name, 9), name))]


def _chart(name: str, points: list[tuple[int, float]]) -> str:
    label = escape(plain(name.replace("_", " ")))
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = _range(values)
    begin, end = min(steps), max(steps)
    places = [(_place(step, begin, end, LEFT, WIDTH - RIGHT), _height(value, low, high)) for step, value in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places) if len(places) <= DOTS else ""
    ticks = "".join(
        f'<text x="{LEFT - 4}" y="{_height(value, low, high) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low, high)
    )
    ends = (
        f'<text x="{LEFT}" y="{HEIGHT - 6}">step {begin:,}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{end:,}</text>'
    )
    frame = f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    return (
        f'<figure class="chart"><figcaption><b>{label}</b> last {values[-1]:.4g}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}, from {values[0]:.4g} to {values[-1]:.4g}">'
        f'{frame}<polyline class="line" points="{line}"/><g class="dots">{dots}</g>{ticks}{ends}</svg></figure>'
    )


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _place(value: float, low: float, high: float, begin: float, end: float) -> float:
    """Divided first: the difference of two floats may overflow."""
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
    return begin + (end - begin) * (share if math.isfinite(share) else 0.5)


def _height(value: float, low: float, high: float) -> float:
    return _place(value, low, high, HEIGHT - BOTTOM, TOP)
