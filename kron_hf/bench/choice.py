"""Which way the cost model chooses for a layer, and why."""

from dataclasses import dataclass

import torch

from kron_hf.bench.layers import ModelLayer
from kron_hf.factors import kron_flops
from kron_hf.ops import accelerator_costs, cost, fused
from kron_hf.ops.backend import backward_path, forced_backend, forward_path, fused_first, path_name
from kron_hf.ops.gemm import onednn_serves

__all__ = ["SPEED_UP", "Choice", "choose", "total_ratio"]

SPEED_UP = 0.95  # a layer that is to take more of the dense time than this is no faster: choices are not that exact
FUSED_NOT_TAKEN = (
    "the fused kernels promise one, but until they have been measured on a GPU they are taken for large products alone "
    "(8,192 tokens, blocks of 16 to 32, rank up to a quarter of that); KRON_HF_BACKEND=fused takes them"
)


@dataclass(frozen=True)
class Choice:
    """The way chosen for one layer.

    Attributes:
        layer: The layer.
        costs: Predicted cost of each way over that of `nn.Linear`, by its name for `KRON_HF_BACKEND`.
        chosen: Name of the way; of both ways, if the backward takes another one.
        ratio: Predicted cost over that of `nn.Linear`.
        reason: Why it is no faster than dense; None if it is.
        of_what: What the costs are shares of: dense time, on devices without measurements by arithmetic.
        remark: What makes it faster than dense if it is not the factors.
    """

    layer: ModelLayer
    costs: dict[str, float]
    chosen: str
    ratio: float
    reason: str | None
    of_what: str = "dense"
    remark: str | None = None

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.costs.items())
        outlook = "" if self.reason is None else f"; no speed-up expected here: {self.reason}"
        remark = "" if self.remark is None else f" ({self.remark})"
        return f"{self.layer}\n  {costs}\n  chosen: {self.chosen}, {self.ratio:.2f} of {self.of_what}{remark}{outlook}"


def choose(layer: ModelLayer, *, device_type: str, dtype: torch.dtype, tokens: int, training: bool) -> Choice:
    """What `kron_linear` does for a layer, in the forward, or in forward and backward if `training`."""
    shape = layer.shape(device_type, dtype, tokens)
    dense = cost.dense_cost(shape) * (3 if training else 1)

    def ratio(forward: float, backward: float) -> float:
        return (forward + backward * training) / dense

    ways = {path_name(path): path for path in (None, *cost.candidates(shape))}
    costs = {
        name: ratio(cost.forward_cost(shape, path), cost.backward_cost(shape, path, path))
        for name, path in ways.items()
    }
    forward, backward, input_gradient = forward_path(shape), backward_path(shape), forward_path(shape.transposed)
    chosen = [path_name(forward), path_name(backward)] if training and forward != backward else [path_name(forward)]
    chosen_ratio = ratio(cost.forward_cost(shape, forward), cost.backward_cost(shape, backward, input_gradient))
    if device_type == "cuda" and fused.supports(shape):
        costs["fused"] = ratio(*accelerator_costs.fused_cost(shape))
        if fused_first(shape):
            chosen, chosen_ratio = ["fused"], costs["fused"]
    reason = None if chosen_ratio < SPEED_UP else _reason(layer, tokens)
    if reason is not None and costs.get("fused", chosen_ratio) < min(chosen_ratio, SPEED_UP):
        reason = FUSED_NOT_TAKEN
    forced = "" if forced_backend() is None else " (KRON_HF_BACKEND)"
    of_what = "dense" if device_type == "cpu" else "dense by arithmetic"
    remark = None
    if forward is None and onednn_serves(device_type, dtype, tokens * layer.in_features * layer.out_features):
        remark = "products with W by oneDNN, where nn.Linear takes MKL"
    return Choice(layer, costs, " + ".join(chosen) + forced, chosen_ratio, reason, of_what, remark)


def total_ratio(choices: list[Choice]) -> float:
    """Predicted cost of all layers together over that of `nn.Linear`s."""
    dense = [len(c.layer.names) * c.layer.in_features * c.layer.out_features for c in choices]
    return sum(choice.ratio * entries for choice, entries in zip(choices, dense, strict=True)) / sum(dense)


def _reason(layer: ModelLayer, tokens: int) -> str:
    entries = layer.in_features * layer.out_features
    flops = kron_flops(layer.out_features, layer.in_features, layer.block_size, layer.rank) / (2 * entries)
    if flops > 0.6:
        return f"the factors need {flops:.2f} of its multiply-adds, and run less well"
    if tokens < 512:
        return f"{tokens} tokens are too few to outweigh the calls"
    return f"the factors need {flops:.2f} of its multiply-adds, but moving data outweighs that at this size"
