"""What a selection chose, and how it came to that."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from kron_hf.factors import kron_flops
from kron_hf.selection.candidates import candidate_key
from kron_hf.selection.groups import label_of

__all__ = ["SelectionResult"]


@dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """The choice of a `BlockSizeSelector`, finished or not; `str()` of it is a table.

    Attributes:
        options: The options of the selector.
        shapes: `[out, in]` of each layer's weight, by its name; of a convolution `[out, in, kh * kw, stride product]`.
        sizes: Of each layer, `[bo, bi, rank]` of its candidates by their names.
        alive: Of each layer, the names of the candidates left.
        events: The drops in their order: `step`, `layer` (None is all layers together), `dropped`, and in validation
            mode `losses_without`, the held-out loss without each of those that were left then.
        steps: At which optimizer steps the norms were taken.
        norms: `||theta_k||` of each candidate then, over all layers; None once it was dropped.
    """

    options: dict[str, Any]
    shapes: dict[str, list[int]]
    sizes: dict[str, dict[str, list[int]]]
    alive: dict[str, list[str]]
    events: list[dict[str, Any]]
    steps: list[int]
    norms: dict[str, list[float | None]]

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Of the state of a `BlockSizeSelector`."""
        names, rows = state["names"], [_over_choices(row) for row in state["record"]["norms"]]
        labels = dict.fromkeys(label for row in rows for label in row)
        return cls(
            options=dict(state["options"]),
            shapes=dict(zip(names, state["shapes"], strict=True)),
            sizes={
                name: {candidate_key((out, in_), rank): [out, in_, rank] for out, in_, rank in sizes}
                for name, sizes in zip(names, state["sizes"], strict=True)
            },
            alive=dict(zip(names, state["alive"], strict=True)),
            events=list(state["events"]),
            steps=list(state["record"]["steps"]),
            norms={label: [row.get(label) for row in rows] for label in labels},
        )

    @property
    def done(self) -> bool:
        """Whether one candidate is left in every layer."""
        return all(len(left) == 1 for left in self.alive.values())

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """`{module name: {"block_size": [bo, bi], "rank": r}}` of the choice, as in checkpoints.

        Raises:
            ValueError: The selection is not finished.
        """
        if not self.done:
            raise ValueError(f"the selection is not finished: {max(map(len, self.alive.values()))} candidates are left")
        chosen = {name: self.sizes[name][left[0]] for name, left in self.alive.items()}
        return {name: {"block_size": [out, in_], "rank": rank} for name, (out, in_, rank) in chosen.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"modules": self.modules if self.done else None}

    def plot(self, path: str | Path) -> None:
        """Draws the norm of every candidate over the steps, figure 3 of the paper; needs matplotlib."""
        from kron_hf.selection.picture import draw

        draw(self, path)

    def __str__(self) -> str:
        header = ["candidate", "params of dense", "FLOPs of dense", "layers", "dropped at step", "loss without it"]
        groups = {label: self._row(label, keys) for label, keys in self._candidates().items()}
        return _table([header, *groups.values()])

    def _candidates(self) -> dict[str, dict[str, str]]:
        """`{label: {layer: key}}`; in a global choice a candidate may have another key in each layer."""
        if self.options.get("scope") == "layer":
            keys = dict.fromkeys(key for sizes in self.sizes.values() for key in sizes)
            return {key: {name: key for name, sizes in self.sizes.items() if key in sizes} for key in keys}
        columns = zip(*self.sizes.values(), strict=True)
        return {label_of(keys): dict(zip(self.sizes, keys, strict=True)) for keys in columns}

    def _row(self, label: str, keys: dict[str, str]) -> list[str]:
        params = flops = dense = 0
        for name, key in keys.items():
            (out, in_, *of_conv), (block_out, block_in, rank) = self.shapes[name], self.sizes[name][key]
            kernel, inputs = of_conv or (1, 1)
            blocks = (out // block_out) * (in_ // block_in)
            params += blocks * (1 + rank) + rank * block_out * block_in * kernel
            flops += kron_flops(out, in_, (block_out, block_in), rank, kernel_entries=kernel, input_positions=inputs)
            dense += out * in_ * kernel
        kept = sum(key in self.alive[name] for name, key in keys.items())
        drops = [event for event in self.events if event["dropped"] == label]
        steps = sorted({event["step"] for event in drops})
        losses = [event["losses_without"][label] for event in drops if event["losses_without"]]
        return [
            label,
            f"{params / dense:.4f}",
            f"{flops / (2 * dense):.4f}",
            str(kept),
            "-".join(str(step) for step in dict.fromkeys([*steps[:1], *steps[-1:]])) or "kept",
            f"{sum(losses) / len(losses):.4f}" if losses else "",
        ]


def _over_choices(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """The norms of all layers together, from those of each choice."""
    squares: dict[str, float] = {}
    for row in rows:
        for label, norm in row.items():
            squares[label] = squares.get(label, 0.0) + norm**2
    return {label: square**0.5 for label, square in squares.items()}


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
