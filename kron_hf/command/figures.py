"""The figures among what Trainer's `evaluate` gives."""

from collections.abc import Mapping

__all__ = ["named_figures", "shown_figures"]

NO_FIGURES = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),
    *("epoch", "sparsity"),
)


def named_figures(metrics: Mapping[str, float], prefix: str, name: str) -> dict[str, float]:
    """What was measured, without times, with `name_` in the place of Trainer's `prefix_`."""
    short = {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items()}
    return {f"{name}_{key}": value for key, value in short.items() if key not in NO_FIGURES}


def shown_figures(figures: Mapping[str, float]) -> str:
    """On one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
