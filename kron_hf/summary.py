"""`kron_summary`: what a model with Kronecker layers costs, counted from its tensors."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from kron_hf.escaping import plain
from kron_hf.factors import kron_flops
from kron_hf.layers import KronLinear
from kron_hf.sparsity.pruning import block_masks

__all__ = ["KronSummary", "LayerSummary", "kron_summary"]

TOTALS = (
    "trained_params",
    "deployed_params",
    "dense_params",
    "forward_flops",
    "training_flops",
    "dense_forward_flops",
    "dense_training_flops",
)


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One Kronecker layer, or the sum over all of them.

    Attributes:
        name: Name of the module in the model.
        block_size: `(bo, bi)`; None in a sum.
        rank: Number of Kronecker terms; None in a sum.
        sparsity: Share of the entries of W in blocks that are exactly zero under the mask; None on the meta device.
        trained_params: Entries of S, A, B and the bias that require a gradient.
        deployed_params: Entries of A, B and the bias: S is folded into A.
        dense_params: Entries of the weight and bias of the `nn.Linear` it stands for.
        forward_flops: Per token; see `kron_summary`.
        training_flops: Per token, forward and backward.
        dense_forward_flops: The same for the `nn.Linear`.
        dense_training_flops: The same for the `nn.Linear`.
    """

    name: str
    block_size: tuple[int, int] | None
    rank: int | None
    sparsity: float | None
    trained_params: int
    deployed_params: int
    dense_params: int
    forward_flops: int
    training_flops: int
    dense_forward_flops: int
    dense_training_flops: int


@dataclass(frozen=True, kw_only=True)
class KronSummary:
    """What `kron_summary` returns; `str()` is a table.

    Attributes:
        layers: The Kronecker layers, in module order.
        converted: Their sum.
        trained_params: Entries of all parameters of the model that require a gradient.
        deployed_params: Entries of all parameters once S is folded into A.
        dense_params: Entries of all parameters of the same model with `nn.Linear` layers.
    """

    layers: tuple[LayerSummary, ...]
    converted: LayerSummary
    trained_params: int
    deployed_params: int
    dense_params: int

    @property
    def sparsity(self) -> float | None:
        """Share of the entries of all converted weights that lie in zero blocks; None on the meta device."""
        return self.converted.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("module", "block", "rank", "sparsity", "trained", "deployed", "dense", "FLOPs/token", "of dense")
        rows = [header, *(_row(layer) for layer in (*self.layers, self.converted))]
        whole = (f"{self.trained_params:,}", f"{self.deployed_params:,}", f"{self.dense_params:,}")
        rows.append(("whole model", "", "", "", *whole, "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [_line(row, widths) for row in rows]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def kron_summary(model: nn.Module) -> KronSummary:
    r"""Counts parameters, sparsity and FLOPs of the Kronecker layers of a model against `nn.Linear`.

    A module that the model uses in several places is counted once. A multiply-add is 2 FLOPs. Per token, the factored
    algorithm (paper, propositions 2 and 3) takes the cheaper of two orders:

        B first: Z_i = X B_i^T, Y = sum_i (S * A_i) Z_i     2 * rank * (in * bo + out * I)
        A first: T_i = (S * A_i) X, Y = sum_i T_i B_i^T     2 * rank * (in * O + out * bi)

    against `2 * in * out`. Training is the forward plus, for each of its products, the gradients of both operands: of
    the input and of the factors. That is three times the forward, as for a dense layer, with the intermediate kept for
    the backward; the operator may recompute it to save memory. Not counted: the bias, S * A, which is once a step,
    and what zero blocks could save, since no kernel skips them. A layer called several times in a forward counts once.

    Args:
        model: Any module: a single `KronLinear`, a transformers model, on any device. On the meta device sparsity is
            None. If it is sharded (FSDP2), all processes must call this.

    Example:
        >>> from kron_hf import KronLinear
        >>> kron_summary(KronLinear(256, 8, block_size=(4, 16), rank=1, bias=False)).trained_params
        128
    """
    named = {name: module for name, module in model.named_modules() if isinstance(module, KronLinear)}
    shares = _sparsities(list(named.values()))
    layers = tuple(
        _summarize(name or type(model).__name__, layer, share)
        for (name, layer), share in zip(named.items(), shares, strict=True)
    )
    inside = {id(parameter) for layer in named.values() for parameter in layer.parameters()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    converted = _sum_up(layers)
    return KronSummary(
        layers=layers,
        converted=converted,
        trained_params=_trained(model.parameters()),
        deployed_params=others + converted.deployed_params,
        dense_params=others + converted.dense_params,
    )


def _sparsities(layers: list[KronLinear]) -> list[float | None]:
    if any(layer.s.is_meta for layer in layers):
        return [None] * len(layers)
    return [int((~alive).sum()) / alive.numel() for alive in block_masks(layers)]


def _summarize(name: str, layer: KronLinear, sparsity: float | None) -> LayerSummary:
    bias = 0 if layer.bias is None else layer.bias.numel()
    forward = kron_flops(layer.out_features, layer.in_features, layer.block_size, layer.rank)
    entries = layer.out_features * layer.in_features
    return LayerSummary(
        name=name,
        block_size=layer.block_size,
        rank=layer.rank,
        sparsity=sparsity,
        trained_params=_trained(layer.parameters()),
        deployed_params=layer.a.numel() + layer.b.numel() + bias,
        dense_params=entries + bias,
        forward_flops=forward,
        training_flops=3 * forward,
        dense_forward_flops=2 * entries,
        dense_training_flops=6 * entries,
    )


def _sum_up(layers: Iterable[LayerSummary]) -> LayerSummary:
    layers = tuple(layers)
    totals = {field: sum(getattr(layer, field) for layer in layers) for field in TOTALS}
    return LayerSummary(name="converted layers", block_size=None, rank=None, sparsity=_joint_sparsity(layers), **totals)


def _joint_sparsity(layers: tuple[LayerSummary, ...]) -> float | None:
    """Mean over the layers, weighted with the entries of their weights; 0 without layers."""
    zeros, entries = 0.0, 0
    for layer in layers:
        if layer.sparsity is None:
            return None
        weight_entries = layer.dense_forward_flops // 2
        zeros, entries = zeros + layer.sparsity * weight_entries, entries + weight_entries
    return zeros / entries if entries else 0.0


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _row(layer: LayerSummary) -> tuple[str, ...]:
    ratio = f"{layer.forward_flops / layer.dense_forward_flops:.3f}" if layer.dense_forward_flops else "-"
    return (
        plain(layer.name),
        "" if layer.block_size is None else f"{layer.block_size[0]} x {layer.block_size[1]}",
        "" if layer.rank is None else str(layer.rank),
        "-" if layer.sparsity is None else f"{layer.sparsity:.4f}",
        f"{layer.trained_params:,}",
        f"{layer.deployed_params:,}",
        f"{layer.dense_params:,}",
        f"{layer.forward_flops:,}",
        ratio,
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = (
        f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()
