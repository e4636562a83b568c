"""What the steps of a product cost on CPUs, in multiply-adds of a large dense product by all threads together.

Measured on an AVX-512 machine (torch 2.13, MKL); `python -m examples.benchmarks.calibrate` measures them anew and
prints what would stand here (`examples/results/cpu_costs.json` is such a run). The costs of floats and of waking
threads are those with which the choices come next to the best way in `examples/results/benchmarks.jsonl` (suite
`paths`): timings of single products depend on where buffers lie. Costs by float stand for the traffic, those by entry
of W are paid once a call.
"""

from typing import NamedTuple

import torch

__all__ = ["CpuCosts", "Rates", "cpu_costs"]


class Rates(NamedTuple):
    """Cost of a multiply-add and of a float of input, output or between, forward and backward, of one layout."""

    forward: float
    forward_float: float
    backward: float
    backward_float: float


class CpuCosts(NamedTuple):
    """For one dtype, and for one thread or several.

    Attributes:
        token_major: Rates of that layout.
        token_last: Rates of that layout.
        build: An entry of W: to build it.
        weight_gradient: An entry of W: to reduce its gradient to those of M_i and B_i.
        onednn: A multiply-add of a product with W by oneDNN, where it serves (see `gemm`).
        read: An entry of W: to fetch it for a product, of few tokens nearly all that it takes.
        gather: A float of the input, to gather it with other living blocks.
        fill: A float of the output, to fill it before what lives is written into it.
        scatter: A float of the output, to write it between dead block rows.
        scatter_run: The same, for each run of `bo` floats: short runs are slow to write.
        operator: What one of its calls takes beyond those of torch below, by one thread: Python and the dispatcher.
        call: One call of torch, by one thread.
        wake: To wake other threads for it: small matrix products wake those that sleep, too.
    """

    token_major: Rates
    token_last: Rates
    build: float = 30
    weight_gradient: float = 80
    onednn: float = 0.87
    read: float = 8
    gather: float = 25
    fill: float = 9
    scatter: float = 25
    scatter_run: float = 280
    operator: float = 1.5e6
    call: float = 0.4e6
    wake: float = 5e6

    def calls(self, number: float, threads: int) -> float:
        """That many calls of torch: the other threads could compute meanwhile, and are woken for each."""
        return number * (self.call * threads + (self.wake if threads > 1 else 0))

    def product(self, calls: float, threads: int) -> float:
        """A call of the operator that makes that many of torch."""
        return self.operator * threads + self.calls(calls, threads)


_FLOAT32 = CpuCosts(Rates(1.25, 11, 1.45, 14), Rates(1.05, 32, 1.4, 38))
# The dense product is twice as fast here, moving data is not.
_BFLOAT16 = CpuCosts(Rates(1.2, 40, 1.5, 90), Rates(1.0, 115, 1.7, 115))
# Small products have no fast kernel; the dense backward has none either, so that factors win there anyway.
_FLOAT16 = CpuCosts(Rates(5, 15, 1.45, 18), Rates(22, 34, 1.4, 43))
# (one thread, several); those by float and entry were measured with one.
_MEASURED = {
    torch.float32: (_FLOAT32, _FLOAT32),
    torch.bfloat16: (_BFLOAT16, _BFLOAT16),
    torch.float16: (_FLOAT16, _FLOAT16),
}


def cpu_costs(dtype: torch.dtype, threads: int) -> CpuCosts:
    """Those of float32 for dtypes that were not measured."""
    return _MEASURED.get(dtype, _MEASURED[torch.float32])[threads > 1]
