"""How the property-based tests run: deterministic, a few examples by default and many with the slow tests."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

PROFILE = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test with `examples=few`, and among the slow tests with `examples=many`."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)], ids=str)


def check_all(check: Callable[[Any], None], cases: SearchStrategy, examples: int) -> None:
    """Checks that many cases; prints how many, which `pytest -rP` shows."""
    count = 0

    @settings(PROFILE, max_examples=examples)
    @given(cases)
    def run(case: Any) -> None:
        nonlocal count
        count += 1
        check(case)

    run()
    print(f"{count} examples")  # noqa: T201
    assert count >= examples
