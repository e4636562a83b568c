"""Means of the parts of a loss, over steps and processes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kron_hf.distillation.config import PARTS

__all__ = ["PartMeans"]


class PartMeans:
    """Weighted means of scalars, summed on their device: nothing waits for them before they are logged."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [1, parts, 2]: values and weights

    def add(self, parts: Mapping[str, Tensor], weight: float) -> None:
        """Adds one batch of this process: parts that were multiplied by their weight."""
        zero = next(iter(parts.values())).new_zeros(())
        rows = [torch.stack([parts.get(part, zero), zero + weight * (part in parts)]) for part in PARTS]
        sums = torch.stack(rows)[None]
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, gather: Callable[[Tensor], Any]) -> dict[str, float]:
        """The means since the last call, over all processes, which must all call this; {} if nothing was added."""
        if self._sums is None:
            return {}
        sums, self._sums = gather(self._sums).sum(0).tolist(), None
        return {part: value / weight for part, (value, weight) in zip(PARTS, sums, strict=True) if weight > 0}
