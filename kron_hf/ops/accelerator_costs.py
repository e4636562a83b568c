"""What a product costs on accelerators, of which none has been measured: arithmetic, by the roofline.

Each kernel takes the longer of its multiply-adds and of moving what it reads and writes; together they take at least as
long as to launch them one after another. The rates are those of NVIDIA's H200: 790 TFLOP/s in bfloat16 (half of it in
TF32, 50 in float32 and float64), 4.3 TB/s, 5 us to launch a kernel from Python. Costs are in multiply-adds of a large
dense product, a token, as in `cost`.
"""

from typing import NamedTuple

import torch

from kron_hf.ops.ways import Factored, Shape, between

__all__ = ["backward_cost", "dense_cost", "forward_cost", "fused_cost"]

_BYTES = 4.3e12  # a second
_MULTIPLY_ADDS = {torch.bfloat16: 395e12, torch.float16: 395e12}  # a second
_TF32, _OTHERS = 197e12, 25e12
_LAUNCH = 5e-6  # seconds


class _Kernel(NamedTuple):
    """Multiply-adds and elements moved, a token."""

    multiply_adds: float
    moved: float


def dense_cost(shape: Shape) -> float:
    """What the forward of `nn.Linear` costs, and each of the two products of its backward."""
    return _cost(shape, [_dense(shape)])


def forward_cost(shape: Shape, path: Factored | None) -> float:
    """What a way to `x W^T` costs."""
    if path is None:
        return _cost(shape, [*_once(shape, shape.rank, 1), *_once(shape, 0, 2), _dense(shape)])
    oriented = shape if path.order == "b_first" else shape.transposed
    expand, contract = _products(oriented)
    x, y = _Kernel(0, 2 * shape.in_features), _Kernel(0, 2 * shape.out_features)
    kernels = [expand, contract, y] if path.order == "b_first" else [x, contract, expand, y]
    return _cost(shape, kernels, -(-shape.tokens // path.chunk))


def backward_cost(shape: Shape, path: Factored | None, input_path: Factored | None = None) -> float:
    """What a way to all gradients costs; where it is None, `input_path` is the way to the gradient of x."""
    if path is None:
        reduced = [*_once(shape, 0, 2), *_once(shape, shape.rank, 1) * 2]
        return _cost(shape, [_dense(shape), *reduced]) + forward_cost(shape.transposed, input_path)
    oriented = shape if path.order == "b_first" else shape.transposed
    expand, contract = _products(oriented)
    g, grad_x = _Kernel(0, 2 * oriented.out_features), _Kernel(0, 2 * shape.in_features)
    # Z again, dM, V, dB, and dX from V or, where M comes first, from Z.
    kernels = [g, expand, contract, contract, expand, expand if path.order == "b_first" else contract, grad_x]
    return _cost(shape, kernels, -(-shape.tokens // path.backward_chunk))


def fused_cost(shape: Shape) -> tuple[float, float]:
    """What the Triton kernels cost, forward and backward: they move inputs and outputs alone, see `fused.kernels`."""
    expand, contract = _products(shape.transposed)  # M comes first
    features = shape.in_features + shape.out_features
    product = _Kernel(expand.multiply_adds + contract.multiply_adds, features)
    grad_x_and_b = _Kernel(2 * expand.multiply_adds + contract.multiply_adds, features + shape.in_features)
    return _cost(shape, [product]), _cost(shape, [grad_x_and_b, product])


def _dense(shape: Shape) -> _Kernel:
    read = shape.in_features * shape.out_features / max(1, shape.tokens)
    return _Kernel(shape.in_features * shape.out_features, shape.in_features + shape.out_features + read)


def _once(shape: Shape, products: float, moved: float) -> list[_Kernel]:
    """A kernel over the entries of W, which all tokens share."""
    entries = shape.in_features * shape.out_features / max(1, shape.tokens)
    return [_Kernel(products * entries, moved * entries)]


def _products(shape: Shape) -> tuple[_Kernel, _Kernel]:
    """The products with B and with M of a layer of this shape where B comes first."""
    by_b = shape.rank * shape.in_features * shape.block_out
    by_m = shape.rank * shape.in_blocks * shape.out_features
    middle = between(shape, "b_first")
    return _Kernel(by_b, shape.in_features + middle), _Kernel(by_m, middle + shape.out_features)


def _cost(shape: Shape, kernels: list[_Kernel], repeats: int = 1) -> float:
    rate = _MULTIPLY_ADDS.get(shape.dtype, _TF32 if shape.tf32 else _OTHERS)
    element = rate * shape.dtype.itemsize / _BYTES
    computing = sum(max(kernel.multiply_adds, element * kernel.moved) for kernel in kernels)
    return max(computing, repeats * len(kernels) * _LAUNCH * rate / max(1, shape.tokens))
