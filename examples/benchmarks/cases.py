"""What is measured: one method on one linear, convolution or model, against dense, under given conditions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

__all__ = ["Case", "Conditions", "key_of", "to_row"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method in one place.

    Attributes:
        subject: `"layer"`, `"conv"` or a name in `subjects.MODELS`.
        features: `(in, out)` of a layer, or channels; None for models.
        kernel: Size of a convolution's; None for others.
        stride: Of a convolution.
        image: Height and width of a convolution's images; None for others.
        method: A name in `methods.METHODS`.
        block_size: `(bo, bi)`; None for dense.
        rank: Of Kronecker layers; None for dense.
        sparsity: Share of zero blocks in S.
    """

    subject: str
    features: tuple[int, int] | None = None
    kernel: int | None = None
    stride: int = 1
    image: int | None = None
    method: str
    block_size: tuple[int, int] | None = None
    rank: int | None = None
    sparsity: float = 0.0

    @property
    def place(self) -> str:
        """The layer or model, for people."""
        if self.features is None:
            return self.subject
        place = f"{self.features[0]} -> {self.features[1]}"
        if self.kernel is not None:
            place += f", {self.kernel} x {self.kernel}{f' / {self.stride}' if self.stride > 1 else ''}"
            place += f" of {self.image} x {self.image}"
        return place

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The case that a row of results is of."""
        values = {item.name: row[item.name] for item in fields(cls)}
        pairs = {name: tuple(values[name]) for name in ("features", "block_size") if values[name] is not None}
        return cls(**values | pairs)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all cases of a run share.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        dtype: Name of the dtype of weights and inputs.
        tokens: Rows that a layer gets.
        batch: Images that a convolution or a model gets.
        threads: Of the CPU.
        machine: The processor, or the accelerator.
    """

    device: str
    dtype: str
    tokens: int
    batch: int
    threads: int
    machine: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Those that a row of results was measured under."""
        return cls(**{item.name: row[item.name] for item in fields(cls)})


def key_of(case: Case, conditions: Conditions) -> tuple[Any, ...]:
    """What makes a measurement another one; batch or tokens count where they matter alone."""
    size = conditions.tokens if case.subject == "layer" else conditions.batch
    return case, conditions.device, conditions.dtype, size, conditions.threads, conditions.machine


def to_row(case: Case, conditions: Conditions) -> dict[str, Any]:
    """Both as one flat JSON object."""
    return asdict(case) | asdict(conditions)
