"""`Target`: one module that becomes a Kronecker layer, and what it then costs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kron_hf.escaping import printable
from kron_hf.factors import kron_flops
from kron_hf.kron_kinds import dense_sizes
from kron_hf.selection.candidates import candidate_key

__all__ = ["Target", "warn_not_cheaper"]


@dataclass(frozen=True)
class Target:
    """One module to replace.

    Attributes:
        name: Its full name.
        module: The module.
        block_size: The resolved block size; of the first candidate, if there are several.
        rank: The rank, likewise.
        candidates: Block size and rank of each candidate to choose from; empty where nothing is to be chosen.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    block_size: tuple[int, int]
    rank: int
    candidates: tuple[tuple[tuple[int, int], int], ...] = ()

    @property
    def linear(self) -> nn.Linear:
        """The module, for what works on linears alone.

        Raises:
            ValueError: It is a convolution; names it.
        """
        if not isinstance(self.module, nn.Linear):
            raise ValueError(
                f"{printable(self.name)}: this works on nn.Linear alone, the module is a {type(self.module).__name__}"
            )
        return self.module


def warn_not_cheaper(targets: Sequence[Target], *, stacklevel: int) -> None:
    """One warning of all layers, or candidates, that need as many FLOPs as the dense ones or more."""
    modules: list[str] = []
    candidates: dict[str, list[float]] = {}
    for target in targets:
        for block_size, rank in target.candidates or [(target.block_size, target.rank)]:
            ratio = _relative_flops(target.module, block_size, rank)
            if ratio >= 1 and target.candidates:
                candidates.setdefault(candidate_key(block_size, rank), []).append(ratio)
            elif ratio >= 1:
                modules.append(f"{target.name} ({ratio:.2f}x)")
    listed = [
        f"{key} ({max(ratios):.2f}x, {len(ratios)} of {len(targets)} modules)" for key, ratios in candidates.items()
    ]
    if modules or listed:
        what = "These candidates" if listed else "These modules"
        warnings.warn(
            f"{what} need as many FLOPs as dense ones or more; take a lower rank or another block size: "
            f"{printable(', '.join(modules + listed))}",
            stacklevel=stacklevel + 1,
        )


def _relative_flops(module: nn.Linear | nn.Conv2d, block_size: tuple[int, int], rank: int) -> float:
    out_size, in_size, kernel, inputs = dense_sizes(module)
    flops = kron_flops(out_size, in_size, block_size, rank, kernel_entries=kernel, input_positions=inputs)
    return flops / (2 * out_size * in_size * kernel)
