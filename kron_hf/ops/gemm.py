"""`x W^T` of a CPU by the faster of the two libraries that torch brings.

In float32 torch takes MKL, which leaves a part of what AMD's processors can do; oneDNN, which torch takes for
convolutions and for bfloat16, is faster there (`python -m examples.benchmarks.libraries`). Nothing else was measured:
on other processors, in other dtypes, and for products so small that to prepare a kernel for a new shape would take
longer than the product, it is what torch takes.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear", "onednn_linear", "onednn_serves"]

_MIN_MULTIPLY_ADDS = 2**25  # .4 ms on two cores; a kernel for a new shape takes about as long to prepare
_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` for x `[n, in]`, weight `[out, in]`."""
    serves = onednn_serves(x.device.type, x.dtype, len(x) * weight.numel())
    return onednn_linear(x, weight, bias) if serves else F.linear(x, weight, bias)


def onednn_serves(device_type: str, dtype: torch.dtype, multiply_adds: int) -> bool:
    """Whether oneDNN is the faster for a product of so many multiply-adds."""
    if multiply_adds < _MIN_MULTIPLY_ADDS or device_type != "cpu" or dtype != torch.float32:
        return False
    allowed: bool = torch.backends.mkldnn.enabled  # pyright: ignore[reportAssignmentType]
    return allowed and _faster()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, where `onednn_serves`; without autograd."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@cache
def _faster() -> bool:
    """Whether the processor is one where that was measured, and torch has the operator as it was then."""
    about = torch.cpu.get_capabilities()
    known = "AMD" in about.get("cpu_name", "") and about.get("avx512_f", False)
    if not (known and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator is not None and str(operator.default._schema) == _SCHEMA
