"""What a candidate costs: parameters, FLOPs per token, or measured seconds, beside the dense layer's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kron_hf.factors import kron_flops
from kron_hf.layers import KronLinear
from kron_hf.ops import kron_linear
from kron_hf.selection.candidates import KronCandidates
from kron_hf.sharding import local

__all__ = ["COSTS", "Costs", "entries"]

COSTS = (None, "params", "flops", "latency")
ROWS = 1024  # tokens of a timed forward
REPEATS = 15


def entries(layer: KronLinear) -> int:
    """Entries of S, A and B; also of a freed layer."""
    block_out, block_in = layer.block_size
    blocks = layer.out_blocks * layer.in_blocks
    return blocks * (1 + layer.rank) + layer.rank * block_out * block_in


@dataclass(frozen=True)
class Costs:
    """What candidates cost, in parameters, FLOPs per token or seconds.

    Attributes:
        candidates: Of each layer, the cost of its candidates by name.
        dense: Of each layer, the cost of the `nn.Linear` in its place; no bias is counted.
    """

    candidates: list[dict[str, float]]
    dense: list[float]

    @classmethod
    def of(cls, layers: Sequence[KronCandidates], cost: str) -> "Costs":
        """Counts, or measures: "latency" is the median time of a forward of 1,024 tokens; that of rank 0 holds."""
        found: dict[tuple[object, ...], tuple[dict[str, float], float]] = {}
        kinds: list[tuple[object, ...]] = []
        for layer in layers:
            kinds.append((layer.in_features, layer.out_features, *layer.keys))
            if kinds[-1] not in found:  # equal layers cost the same, also where it is measured
                own = {key: _candidate_cost(layer, key, cost) for key in layer.keys}
                found[kinds[-1]] = own, _dense_cost(layer, cost)
        return cls([dict(found[kind][0]) for kind in kinds], [found[kind][1] for kind in kinds])


def _candidate_cost(layer: KronCandidates, key: str, cost: str) -> float:
    candidate = layer.layer(key)
    if cost == "params":
        return entries(candidate)
    if cost == "flops":
        return kron_flops(layer.out_features, layer.in_features, candidate.block_size, candidate.rank)
    return _shared(_kron_seconds(layer, candidate), layer)


def _dense_cost(layer: KronCandidates, cost: str) -> float:
    if cost == "latency":
        return _shared(_dense_seconds(layer), layer)
    return layer.in_features * layer.out_features * (2 if cost == "flops" else 1)


def _kron_seconds(layer: KronCandidates, candidate: KronLinear) -> float:
    blocks = (candidate.out_blocks, candidate.in_blocks)
    shapes = [blocks, (candidate.rank, *blocks), (candidate.rank, *candidate.block_size)]
    s, a, b = (_filled(layer, shape) for shape in shapes)
    x = _filled(layer, (ROWS, layer.in_features))
    return _seconds(lambda: kron_linear(x, s, a, b, None), x.device)


def _dense_seconds(layer: KronCandidates) -> float:
    weight = _filled(layer, (layer.out_features, layer.in_features))
    x = _filled(layer, (ROWS, layer.in_features))
    return _seconds(lambda: F.linear(x, weight), x.device)


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
