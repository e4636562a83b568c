"""Which way a product takes: the one that `KRON_HF_BACKEND` names, else the one that the cost model chooses.

- unset, empty or `auto`: the cheapest by `cost`, for each shape.
- `build-w`: builds W for the moment of the product.
- `token-major`, `token-last`: from the factors, in one of the two layouts of `layouts`, the cheaper order first.
- `token-major-b-first`, `token-major-m-first`, `token-last-b-first`, `token-last-m-first`: in that order.
- `fused`: the Triton kernels; where they cannot serve a product the cost model chooses, and one warning says so.

The environment is read at the first product and holds for the process; within `forced` another way holds. All ways give
the same result up to rounding.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

from kron_hf.ops import cost
from kron_hf.ops.ways import Factored, Shape

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "backward_path",
    "forced",
    "forced_backend",
    "forward_path",
    "fused_first",
    "path_name",
]

VARIABLE = "KRON_HF_BACKEND"
BACKENDS = (
    *("auto", "build-w", "fused"),
    *("token-major", "token-major-b-first", "token-major-m-first"),
    *("token-last", "token-last-b-first", "token-last-m-first"),
)


_forced: list[str] = []  # the innermost last


def forced_backend() -> str | None:
    """The way that `forced` or else the environment names; None leaves the choice to the cost model.

    Raises:
        ValueError: There is no such way.
    """
    name = _forced[-1] if _forced else _named_by_environment()
    return None if name == "auto" else name


@cache
def _named_by_environment() -> str:
    return _checked(os.environ.get(VARIABLE, "") or "auto")


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Within it all products of this process, in all threads, take the way of that name: for measurements.

    Raises:
        ValueError: There is no such way.
    """
    _forced.append(_checked(name))
    _forget_choices()
    try:
        yield
    finally:
        _forced.pop()
        _forget_choices()


@lru_cache(maxsize=4096)
def forward_path(shape: Shape) -> Factored | None:
    """The way to `x W^T`; None is to build W."""
    name = forced_backend()
    if name is None or not _serves(name):
        return cost.forward_path(shape)
    return min(_named(name, shape), key=lambda path: cost.forward_cost(shape, path), default=None)


@lru_cache(maxsize=4096)
def backward_path(shape: Shape) -> Factored | None:
    """The way to all gradients together; None is `grad^T x`, and the gradient of x by itself."""
    name = forced_backend()
    if name is None or not _serves(name):
        return cost.backward_path(shape)
    return min(_named(name, shape), key=lambda path: cost.backward_cost(shape, path), default=None)


@lru_cache(maxsize=4096)
def fused_first(shape: Shape) -> bool:
    """Whether the Triton kernels are tried before the way that `forward_path` or `backward_path` says."""
    name = forced_backend()
    return name == "fused" or (name is None and cost.fused_wins(shape))


def _forget_choices() -> None:
    for choice in (forward_path, backward_path, fused_first):
        choice.cache_clear()


def path_name(path: Factored | None) -> str:
    """What `KRON_HF_BACKEND` calls a way."""
    return "build-w" if path is None else f"{path.layout}-{path.order}".replace("_", "-")


def _named(name: str, shape: Shape) -> list[Factored]:
    return [path for path in cost.factored_paths(shape) if path_name(path).startswith(name)]


def _serves(name: str) -> bool:
    if name == "fused":
        _say_that_fused_does_not_serve()
    return name != "fused"


@cache
def _say_that_fused_does_not_serve() -> None:
    """Once a process: layers of one model would say it a hundred times."""
    warnings.warn(
        f"{VARIABLE}=fused: the fused kernels do not serve every product here; the cost model chooses for the others",
        stacklevel=2,
    )
