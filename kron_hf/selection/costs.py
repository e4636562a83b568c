"""What a candidate costs: parameters, FLOPs per token, or measured seconds, beside the dense layer's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates
from kron_hf.sharding import local

__all__ = ["COSTS", "Costs", "entries"]

COSTS = (None, "params", "flops", "latency")
IMAGE = (32, 32)  # positions, or tokens, of a timed forward
REPEATS = 15


def entries(layer: KronLayer) -> int:
    """Entries of S, A and B; also of a freed layer."""
    return sum(map(prod, layer.factor_shapes.values()))


@dataclass(frozen=True)
class Costs:
    """What candidates cost, in parameters, FLOPs per token (position of the output of a convolution) or seconds.

    Attributes:
        candidates: Of each layer, the cost of its candidates by name.
        dense: Of each layer, the cost of the dense layer in its place; no bias is counted.
    """

    candidates: list[dict[str, float]]
    dense: list[float]

    @classmethod
    def of(cls, layers: Sequence[KronCandidates], cost: str) -> "Costs":
        """Counts, or measures: "latency" is the median time of a forward of 1,024 tokens or pixels, that of rank 0."""
        found: dict[tuple[object, ...], tuple[dict[str, float], float]] = {}
        kinds: list[tuple[object, ...]] = []
        for layer in layers:
            kinds.append((*layer.weight_shape, layer.layer(layer.keys[0]).extra_repr(), *layer.keys))
            if kinds[-1] not in found:  # equal layers cost the same, also where it is measured
                own = {key: _candidate_cost(layer, key, cost) for key in layer.keys}
                found[kinds[-1]] = own, _dense_cost(layer, cost)
        return cls([dict(found[kind][0]) for kind in kinds], [found[kind][1] for kind in kinds])


def _candidate_cost(layer: KronCandidates, key: str, cost: str) -> float:
    candidate = layer.layer(key)
    if cost == "params":
        return entries(candidate)
    if cost == "flops":
        return candidate.forward_flops
    return _shared(_kron_seconds(layer, candidate), layer)


def _dense_cost(layer: KronCandidates, cost: str) -> float:
    if cost == "latency":
        return _shared(_dense_seconds(layer), layer)
    return prod(layer.weight_shape) * (2 if cost == "flops" else 1)


def _kron_seconds(layer: KronCandidates, candidate: KronLayer) -> float:
    twin = candidate.blank_twin(bias=False)
    for name, shape in candidate.factor_shapes.items():
        setattr(twin, name, nn.Parameter(_filled(layer, shape), requires_grad=False))
    x = _input(layer)
    return _seconds(lambda: twin(x), x.device)


def _dense_seconds(layer: KronCandidates) -> float:
    x = _input(layer)
    # On meta first: a start on the device would spend random draws.
    dense = layer.layer(layer.keys[0]).blank_dense(False, torch.device("meta"), x.dtype)
    dense.weight = nn.Parameter(_filled(layer, layer.weight_shape), requires_grad=False)
    return _seconds(lambda: dense(x), x.device)


def _input(layer: KronCandidates) -> Tensor:
    """As many tokens, or an image with as many positions."""
    in_size, *kernel = layer.weight_shape[1:]
    return _filled(layer, (1, in_size, *IMAGE) if kernel else (prod(IMAGE), in_size))


def _filled(layer: KronCandidates, shape: tuple[int, ...]) -> Tensor:
    like = local(layer.layer(layer.alive[0]).s)  # tensors of its own: the factors may be sharded, and no draw is spent
    return torch.full(shape, 0.01, dtype=like.dtype, device=like.device)


@torch.no_grad()
def _seconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    times: list[float] = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        forward()
        _wait(device)
        times.append(time.perf_counter() - began)
    return median(times[REPEATS // 3 :])  # the first ones warm caches up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shared(seconds: float, layer: KronCandidates) -> float:
    if not dist.is_available() or not dist.is_initialized():
        return seconds
    value = torch.tensor(seconds, dtype=torch.float64, device=local(layer.layer(layer.alive[0]).s).device)
    dist.broadcast(value, src=0)
    return float(value)
