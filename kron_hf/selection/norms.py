"""The size of candidates, whatever the scale of their factors against each other.

S / c, c * A is the same weight with another norm of the factors. So the norm is taken in the balanced scaling, where it
is smallest: there the three Frobenius norms of a layer are equal.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kron_hf.kron_layer import KronLayer
from kron_hf.sharding import local

__all__ = ["balanced_norm", "scale_", "squared_norms"]


def balanced_norm(squares: Sequence[tuple[float, float, float]]) -> float:
    """||theta|| in the balanced scaling, of one candidate in one or more layers.

    Args:
        squares: `(||S||^2, ||A||^2, ||B||^2)` in each layer.
    """
    return math.sqrt(sum(3 * math.prod(layer) ** (1 / 3) for layer in squares))


def squared_norms(layers: Sequence[KronLayer]) -> list[tuple[float, float, float]]:
    """`(||S||^2, ||A||^2, ||B||^2)` of each layer, in float64.

    If layers are sharded (FSDP2): one small all-reduce; all processes must call it.
    """
    factors = [factor for layer in layers for factor in (layer.s, layer.a, layer.b)]
    squares = torch.stack([local(factor).double().square().sum() for factor in factors])
    sharded = {index: cast(DTensor, factor) for index, factor in enumerate(factors) if isinstance(factor, DTensor)}
    if sharded:
        first, *_ = sharded.values()
        squares, at = squares.to(first.device_mesh.device_type), list(sharded)
        parts = squares[at]  # whole factors are beside them in layers that FSDP2 does not shard
        dist.all_reduce(parts, group=_group_of(list(sharded.values())))
        squares[at] = parts
    values = squares.tolist()
    return list(zip(values[::3], values[1::3], values[2::3], strict=True))


def _group_of(sharded: Sequence[DTensor]) -> dist.ProcessGroup:
    if any(tensor.device_mesh.ndim != 1 or not tensor.placements[0].is_shard() for tensor in sharded):
        raise ValueError("block-size selection needs parameters sharded along one mesh dimension, as FSDP2 does")
    return sharded[0].device_mesh.get_group()


def scale_(layer: KronLayer, factor: float) -> None:
    """Multiplies S, A and B."""
    tensors: list[Tensor] = [layer.s, layer.a, layer.b]
    for tensor in tensors:
        local(tensor).mul_(factor)
