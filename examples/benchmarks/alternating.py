"""Times of parts of a product, in turn."""

import time
from collections.abc import Callable, Mapping
from statistics import median

__all__ = ["medians"]


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, run in turn so that other work meets all alike; the first two runs do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-2, repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(own) for name, own in times.items()}
