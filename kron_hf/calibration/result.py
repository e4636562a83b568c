"""What a calibration chose for every layer, and the errors that it measured."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from kron_hf.calibration.menu import Option, dense_option, is_low_rank, kron_option
from kron_hf.escaping import plain
from kron_hf.module_map import size_entry

__all__ = ["CalibratedLayer", "CalibrationResult"]

MAX_ROWS = 48  # of a table; layers of the same kind share a row in longer ones
HEADER = ("layer", "shape", "rank", "params of dense", "FLOPs of dense", "error", "held out", "sensitivity")


@dataclass(frozen=True, kw_only=True)
class CalibratedLayer:
    """One layer of a `CalibrationResult`.

    Attributes:
        name: Name of the module in the model.
        out_features: Its outputs.
        in_features: Its inputs.
        has_bias: Whether it has a bias.
        block_size: `(bo, bi)`; None: it stayed dense.
        rank: Number of Kronecker terms; None: it stayed dense.
        error: Relative error of its outputs on the data that it was fitted to, `||y - yhat|| / ||y - mean(y)||`, with
            the inputs that it gets in the converted model and the outputs wanted there. 0 for dense.
        held_out_error: What the choice was made by: the error on the examples held out, in the dense model, of a first
            fit of this size to the others, interpolated between some ranks. None without a budget.
        sensitivity: How much the model's output suffers per unit of `held_out_error ** 2`; None if it was not measured.
        sparsity: Share of its blocks that were removed.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool
    block_size: tuple[int, int] | None = None
    rank: int | None = None
    error: float = 0.0
    held_out_error: float | None = None
    sensitivity: float | None = None
    sparsity: float = 0.0

    @property
    def shape(self) -> str:
        """In words: "dense", "low rank", or the block size as in "4 x 64"."""
        if self.block_size is None:
            return "dense"
        if is_low_rank(self.block_size, self.out_features, self.in_features):
            return "low rank"
        return f"{self.block_size[0]} x {self.block_size[1]}"

    @property
    def option(self) -> Option:
        """What it became, with its parameters as deployed and its FLOPs."""
        if self.block_size is None or self.rank is None:
            return self.dense
        return kron_option(self.out_features, self.in_features, self.has_bias, self.block_size, self.rank)

    @property
    def dense(self) -> Option:
        """What it was."""
        return dense_option(self.out_features, self.in_features, self.has_bias)

    @property
    def kind(self) -> str:
        """Its name with `*` for numbers: what the layers of a stack have in common."""
        return ".".join("*" if part.isdigit() else part for part in self.name.split("."))


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """The layers of a calibrated model; `str()` of it is a table.

    Attributes:
        layers: All layers that could have been converted, in their order, those that stayed dense among them.
        settings: What was asked for, such as `{"target_params": 0.25}`, in plain JSON types.
    """

    layers: tuple[CalibratedLayer, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """Parameters of the layers as deployed: A, B and the biases, with S folded into A, and what stayed dense."""
        return sum(layer.option.params for layer in self.layers)

    @property
    def dense_params(self) -> int:
        """Parameters of the same layers when all were dense."""
        return sum(layer.dense.params for layer in self.layers)

    @property
    def flops(self) -> int:
        """Forward FLOPs per token of the layers, each counted once."""
        return sum(layer.option.flops for layer in self.layers)

    @property
    def dense_flops(self) -> int:
        """The same when all were dense."""
        return sum(layer.dense.flops for layer in self.layers)

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """`{module name: {"block_size": [bo, bi], "rank": r}}` of the converted layers, as in checkpoints.

        `KronConfig.from_modules` makes the config of it that reproduces the choice on a fresh model. Empty if all
        layers stayed dense, which no config can say.
        """
        return {
            layer.name: size_entry(layer.block_size, layer.rank)
            for layer in self.layers
            if layer.block_size is not None and layer.rank is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the settings, the totals, and of each layer its fields, parameters and FLOPs."""
        return {
            "settings": self.settings,
            **{name: getattr(self, name) for name in ("params", "dense_params", "flops", "dense_flops")},
            "layers": [_layer_dict(layer) for layer in self.layers],
            "modules": self.modules,
        }

    def save_json(self, path: str | Path) -> None:
        """Writes `to_dict()`; the file is there whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def plot(self, path: str | Path) -> None:
        """Draws shape, share of the parameters and error of every layer; needs matplotlib."""
        from kron_hf.calibration.picture import draw

        draw(self, path)

    def table(self, *, by_kind: bool) -> str:
        """A row for every layer, or for all that differ only in the numbers in their names."""
        groups = [[layer] for layer in self.layers]
        if by_kind:
            kinds = dict.fromkeys(layer.kind for layer in self.layers)
            groups = [[layer for layer in self.layers if layer.kind == kind] for kind in kinds]
        rows = [HEADER, *(_row(group) for group in groups), _total_row(self)]
        if any(layer.sparsity for layer in self.layers):
            zeros = ["zero blocks", *(_span((layer.sparsity for layer in group), ".3f") for group in groups), ""]
            rows = [(*row, share) for row, share in zip(rows, zeros, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *lines, last = (_line(row, widths) for row in rows)
        rule = "-" * max(map(len, (first, *lines, last)))
        return "\n".join([first, rule, *lines, rule, last])

    def __str__(self) -> str:
        return self.table(by_kind=len(self.layers) > MAX_ROWS)


def _layer_dict(layer: CalibratedLayer) -> dict[str, Any]:
    values = {**asdict(layer), "params": layer.option.params, "dense_params": layer.dense.params}
    values |= {"flops": layer.option.flops, "dense_flops": layer.dense.flops}
    # JSON has no NaN.
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _row(layers: Sequence[CalibratedLayer]) -> tuple[str, ...]:
    shapes = sorted(layer.shape for layer in layers)
    counts = {shape: len(list(group)) for shape, group in groupby(shapes)}
    several = len(layers) > 1
    return (
        f"{plain(layers[0].kind)} ({len(layers)})" if several else plain(layers[0].name),
        ", ".join(f"{count} {shape}" for shape, count in counts.items()) if several else shapes[0],
        _span((layer.rank for layer in layers), "d"),
        *_shares(layers),
        _span((layer.error for layer in layers), ".3f"),
        _span((layer.held_out_error for layer in layers), ".3f"),
        _span((layer.sensitivity for layer in layers), ".2g"),
    )


def _total_row(result: CalibrationResult) -> tuple[str, ...]:
    converted = [layer for layer in result.layers if layer.block_size is not None]
    errors = [_span(values, ".3f") for values in (_errors(converted), _errors(converted, held_out=True))]
    what = f"{len(converted)} of {len(result.layers)} layers converted"
    return (what, "", "", *_shares(result.layers), *errors, "")


def _errors(layers: Iterable[CalibratedLayer], held_out: bool = False) -> list[float | None]:
    return [layer.held_out_error if held_out else layer.error for layer in layers]


def _shares(layers: Iterable[CalibratedLayer]) -> tuple[str, str]:
    options, dense = zip(*((layer.option, layer.dense) for layer in layers), strict=True)
    params = sum(option.params for option in options) / sum(option.params for option in dense)
    flops = sum(option.flops for option in options) / sum(option.flops for option in dense)
    return f"{params:.4f}", f"{flops:.4f}"


def _span(values: Iterable[float | None], style: str) -> str:
    """The value, or the smallest and largest of several; nothing of none."""
    known = sorted(value for value in values if value is not None)
    return " to ".join(dict.fromkeys(f"{value:{style}}" for value in (known[0], known[-1]))) if known else ""


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()
