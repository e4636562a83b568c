"""What a summary holds, its sums, and the table that it prints."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from kron_hf.escaping import plain

__all__ = ["KronSummary", "LayerSummary", "sum_up", "summarize_model", "trained_entries"]

COUNTS = (
    "trained_params",
    "nonzeros",
    "deployed_params",
    "dense_params",
    "forward_flops",
    "training_flops",
    "ideal_forward_flops",
    "dense_forward_flops",
    "dense_training_flops",
)
HEADER = ("module", "block", "rank", "sparsity", "trained", "nonzeros", "deployed", "dense", "FLOPs/token", "of dense")


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One layer, or the sum over all of them.

    Attributes:
        name: Name of the module in the model.
        block_size: `(bo, bi)`; None in a sum, and for a layer whose block size is being selected.
        rank: Number of Kronecker terms; None likewise and for dense layers.
        kernel_size: `(kh, kw)` of a convolution.
        sparsity: Share of the entries of W in blocks that are exactly zero, under the mask; None on the meta device.
        trained_params: Entries that require a gradient: of S, A, B and the bias, or of a dense weight and its bias.
        nonzeros: Entries that zero blocks leave alive, see `kron_summary` and `block_summary`; None on the meta device.
        deployed_params: Entries of A, B and the bias, since S is folded into A; all of a dense layer.
        dense_params: Entries of the weight and bias of the dense layer it stands for, or is.
        forward_flops: Per token, or position of the output of a convolution, as all FLOPs here.
        training_flops: Per token, forward and both gradients: three times the forward.
        ideal_forward_flops: Per token, of a kernel that skips zero blocks. **None does**: it is what sparsity could
            save, not what it saves. None on the meta device.
        dense_forward_flops: Per token, of the dense layer, `2 * in * out`, times `kh * kw`.
        dense_training_flops: Per token, of the dense layer, three times that.
    """

    name: str
    block_size: tuple[int, int] | None
    rank: int | None
    sparsity: float | None
    trained_params: int
    nonzeros: int | None
    deployed_params: int
    dense_params: int
    forward_flops: int
    training_flops: int
    ideal_forward_flops: int | None
    dense_forward_flops: int
    dense_training_flops: int
    kernel_size: tuple[int, ...] | None = None

    def shares_of_dense(self) -> dict[str, float | None]:
        """Counts over those of the `nn.Linear`s, by field; None where there is no count or nothing to compare with."""
        flops = ("forward_flops", "ideal_forward_flops")
        shares: dict[str, float | None] = {}
        for name in ("trained_params", "nonzeros", "deployed_params", *flops):
            count, whole = getattr(self, name), self.dense_forward_flops if name in flops else self.dense_params
            shares[name] = None if count is None or not whole else count / whole
        return shares


@dataclass(frozen=True, kw_only=True)
class KronSummary:
    """What `kron_summary` and `block_summary` return; `str()` is a table.

    Attributes:
        layers: The layers that are counted one by one, in module order.
        converted: Their sum.
        trained_params: Entries of all parameters of the model that require a gradient.
        nonzeros: Entries of all parameters but those that belong to zero blocks of the layers; None on the meta device.
        deployed_params: Entries of all parameters once S is folded into A.
        dense_params: Entries of all parameters of the same model with `nn.Linear` layers.
        masks: Which blocks are alive, bool `[O, I]` by layer; not of layers whose block size is being selected, nor on
            the meta device. Not in `to_dict()`.
    """

    layers: tuple[LayerSummary, ...]
    converted: LayerSummary
    trained_params: int
    nonzeros: int | None
    deployed_params: int
    dense_params: int
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sparsity(self) -> float | None:
        """Share of the entries of all their weights that lie in zero blocks; None on the meta device."""
        return self.converted.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, ready for JSON; with `shares_of_dense` of the sum."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "masks"}
        values |= {"layers": tuple(asdict(layer) for layer in self.layers), "converted": asdict(self.converted)}
        return values | {"shares_of_dense": self.converted.shares_of_dense()}

    def plot(self) -> Any:
        """Sparsity, parameters and masks of the layers, as a `matplotlib.figure.Figure`: `.savefig("layers.png")`.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: There are no layers.
        """
        from kron_hf.summary.picture import draw_summary

        return draw_summary(self)

    def __str__(self) -> str:
        rows = [HEADER, *(_row(layer) for layer in (*self.layers, self.converted))]
        counts = (self.trained_params, self.nonzeros, self.deployed_params, self.dense_params)
        rows.append(("whole model", "", "", "", *map(_count, counts), "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        lines = [_line(row, widths) for row in rows]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], *_shares_line(self.converted)])


def summarize_model(
    model: nn.Module,
    layers: Iterable[LayerSummary],
    inside: Iterable[nn.Module],
    of: str,
    masks: Mapping[str, Tensor | None],
) -> KronSummary:
    """Adds what the model has outside of the layers.

    Args:
        model: The model.
        layers: What was counted of its layers.
        inside: The layers themselves, each once.
        of: Name of the sum over them.
        masks: Which of their blocks are alive; None where that is not known.
    """
    layers = tuple(layers)
    own = {id(parameter) for layer in inside for parameter in layer.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in own]
    others = sum(parameter.numel() for parameter in outside)
    converted = sum_up(layers, of)
    return KronSummary(
        layers=layers,
        converted=converted,
        trained_params=trained_entries(outside) + converted.trained_params,  # not of candidates that were dropped
        nonzeros=None if converted.nonzeros is None else others + converted.nonzeros,
        deployed_params=others + converted.deployed_params,
        dense_params=others + converted.dense_params,
        masks={name: mask.cpu() for name, mask in masks.items() if mask is not None},
    )


def trained_entries(parameters: Iterable[nn.Parameter]) -> int:
    """Entries of the parameters that require a gradient."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def sum_up(layers: tuple[LayerSummary, ...], name: str) -> LayerSummary:
    """The sum over layers, with a name of its own."""
    totals = {field: _sum(getattr(layer, field) for layer in layers) for field in COUNTS}
    return LayerSummary(name=name, block_size=None, rank=None, sparsity=_joint_sparsity(layers), **totals)


def _sum(counts: Iterable[int | None]) -> Any:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _joint_sparsity(layers: tuple[LayerSummary, ...]) -> float | None:
    """Mean over the layers, weighted with the entries of their weights; 0 without layers."""
    zeros, entries = 0.0, 0
    for layer in layers:
        if layer.sparsity is None:
            return None
        weight_entries = layer.dense_forward_flops // 2
        zeros, entries = zeros + layer.sparsity * weight_entries, entries + weight_entries
    return zeros / entries if entries else 0.0


def _row(layer: LayerSummary) -> tuple[str, ...]:
    return (
        plain(layer.name),
        "" if layer.block_size is None else " x ".join(map(str, (*layer.block_size, *(layer.kernel_size or ())))),
        "" if layer.rank is None else str(layer.rank),
        "-" if layer.sparsity is None else f"{layer.sparsity:.4f}",
        _count(layer.trained_params),
        _count(layer.nonzeros),
        _count(layer.deployed_params),
        _count(layer.dense_params),
        _count(layer.forward_flops),
        _share(layer.shares_of_dense()["forward_flops"]),
    )


def _shares_line(converted: LayerSummary) -> list[str]:
    """The totals that are compared most, of the layers alone; nothing without layers."""
    if not converted.dense_params:
        return []
    shares = {field: _share(share) for field, share in converted.shares_of_dense().items()}
    return [
        f"{converted.name}, of dense: trained {shares['trained_params']}, nonzeros {shares['nonzeros']}, deployed "
        f"{shares['deployed_params']}, FLOPs {shares['forward_flops']} (if zero blocks were skipped: "
        f"{shares['ideal_forward_flops']}; no kernel does)"
    ]


def _count(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = (
        f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()
