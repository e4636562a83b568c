"""Times of layers that run in turn, so that other work on the machine meets them alike; medians are compared."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from kron_hf.layers import KronLinear

__all__ = ["Comparison", "alternate", "compare", "timed"]


@dataclass(frozen=True)
class Comparison:
    """Median milliseconds of `nn.Linear` and of the Kronecker layer of the same size.

    "Both" is forward and backward, with the gradient of the input and of the bias, without optimizer.
    """

    linear_forward_ms: float
    linear_both_ms: float
    kron_forward_ms: float
    kron_both_ms: float

    @property
    def forward_ratio(self) -> float:
        """Time of the forward over that of `nn.Linear`."""
        return self.kron_forward_ms / self.linear_forward_ms

    @property
    def ratio(self) -> float:
        """Time of forward and backward over that of `nn.Linear`."""
        return self.kron_both_ms / self.linear_both_ms


def compare(
    features: tuple[int, int],
    block_size: tuple[int, int],
    rank: int,
    *,
    tokens: int,
    dtype: torch.dtype,
    repeats: int,
    bias: bool = True,
    device: str = "cpu",
) -> Comparison:
    """Measures a Kronecker layer with `features` (in, out) against `nn.Linear`, which run `repeats` times each."""
    linear = nn.Linear(*features, bias=bias, dtype=dtype, device=device)
    kron = KronLinear(*features, block_size, rank, bias=bias, dtype=dtype, device=device)
    x = torch.randn(tokens, features[0], dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(tokens, features[1], dtype=dtype, device=device)
    (linear_forward, linear_both), (kron_forward, kron_both) = alternate((linear, kron), x, gradient, repeats)
    return Comparison(linear_forward, linear_both, kron_forward, kron_both)


def alternate(layers: Sequence[nn.Module], x: Tensor, gradient: Tensor, repeats: int) -> list[tuple[float, float]]:
    """Median milliseconds of forward, and of forward + backward, of each layer; they run in turn."""
    runs: list[list[tuple[float, float]]] = [[] for _ in layers]
    for repeat in range(repeats + 1):
        for layer, results in zip(layers, runs, strict=True):
            milliseconds = timed(layer, x, gradient)
            if repeat:  # the first run only warms up
                results.append(milliseconds)
    return [(median(run[0] for run in results), median(run[1] for run in results)) for results in runs]


def timed(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Milliseconds of one forward, and of forward + backward."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    _wait_for(x)
    start = time.perf_counter()
    out = layer(x)
    _wait_for(x)
    middle = time.perf_counter()
    out.backward(gradient)
    _wait_for(x)
    end = time.perf_counter()
    return 1e3 * (middle - start), 1e3 * (end - start)


def _wait_for(tensor: Tensor) -> None:
    """Until its device has done what was asked of it."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
