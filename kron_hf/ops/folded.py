"""The factors of a layer as evaluation needs them: S inside A, without block rows and columns that are all zero.

`Tensor._version`, which torch does not document, tells whether a factor has been written to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_hf.factors import kron_weight
from kron_hf.ops import cost
from kron_hf.ops.operator import kron_linear

__all__ = ["Folded", "fold", "tracked"]


@dataclass(frozen=True, eq=False)
class Folded:
    """Computes what the factors it was made from compute; it holds no copy of B and of the bias.

    Attributes:
        sources: The tensors that it was made from.
        marks: What tells that one of them was written to.
        out_blocks: O.
        m: `S * A_i` of the blocks that are left, `[rank, O', I']`; None if W is kept.
        rows: Indices of the O' block rows that are left; None if all are.
        columns: Indices of the I' block columns that are left; None if all are.
        weight: W, `[O * bo, I * bi]`; None if it is not kept.
    """

    sources: tuple[Tensor | None, ...]
    marks: tuple[tuple[int, int] | None, ...]
    out_blocks: int
    m: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    weight: Tensor | None = None

    def is_of(self, sources: Sequence[Tensor | None]) -> bool:
        """Whether it was made from these tensors, and none was written to since, so far as torch notices.

        torch does not notice writes through `tensor.data`, from other processes and from NumPy.
        """
        return all(map(_is, sources, self.sources)) and self.is_current()

    def is_current(self) -> bool:
        """Whether none of the tensors that it was made from was written to since, so far as torch notices."""
        return _marks(self.sources) == self.marks

    def __call__(self, x: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias` for x `[..., I * bi]`, without gradients for the factors."""
        if self.m is None:
            assert self.weight is not None
            return F.linear(x, self.weight, bias)
        leading, tokens, (block_out, block_in) = x.shape[:-1], prod(x.shape[:-1]), b.shape[1:]
        if self.columns is not None:
            x = x.reshape(tokens, x.shape[-1] // block_in, block_in).index_select(1, self.columns)
            x = x.view(*leading, len(self.columns) * block_in)
        if self.rows is None:
            return kron_linear(x, None, self.m, b, bias)
        blocks = (self.out_blocks, block_out)
        living_bias = None if bias is None else bias.view(blocks)[self.rows].flatten()
        y = kron_linear(x, None, self.m, b, living_bias).view(tokens, len(self.rows), block_out)
        out = y.new_zeros(tokens, *blocks) if bias is None else bias.to(y.dtype).view(blocks).repeat(tokens, 1, 1)
        return out.index_copy_(1, self.rows, y).view(*leading, self.out_blocks * block_out)


def _is(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other


def _marks(sources: Sequence[Tensor | None]) -> tuple[tuple[int, int] | None, ...]:
    return tuple(None if source is None else (source._version, source.data_ptr()) for source in sources)


def tracked(
    sources: tuple[Tensor | None, ...],
) -> tuple[tuple[Tensor | None, ...], tuple[tuple[int, int] | None, ...]]:
    """The tensors that a fold is made from, and what tells later that one of them was written to.

    Raises:
        ValueError: They were made in inference mode: torch does not say whether they are written to.
    """
    if any(source is not None and source.is_inference() for source in sources):
        raise ValueError("fold: the factors were made under torch.inference_mode, where changes are not tracked")
    return sources, _marks(sources)


@torch.inference_mode(False)
@torch.no_grad()
def fold(
    s: Tensor, a: Tensor, b: Tensor, dead_blocks: Tensor | None, *, tokens: int, keep_weight: bool = False
) -> Folded:
    """Folds factors for calls with about `tokens` tokens.

    Args:
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi]`.
        dead_blocks: bool `[O, I]`, True where S counts as zero; or None.
        tokens: What the choices are made for; the result is the same for any number.
        keep_weight: Whether W may be kept where a product with it is the cheapest.

    Raises:
        ValueError: The factors were made in inference mode: torch does not say whether they are written to.
    """
    sources, marks = tracked((s, a, b, dead_blocks))
    masked = s if dead_blocks is None else s.masked_fill(dead_blocks, 0.0)
    shape = cost.Shape.of(tokens, a, b)
    living = masked != 0
    rows, columns = living.any(1).nonzero().flatten(), living.any(0).nonzero().flatten()
    dropped = cost.worth_dropping(shape, len(rows), len(columns))
    left = shape._replace(
        out_blocks=len(rows) if dropped.rows else shape.out_blocks,
        in_blocks=len(columns) if dropped.columns else shape.in_blocks,
    )
    factored = cost.forward_cost(left, cost.forward_path(left))
    known = (sources, marks, shape.out_blocks)
    if keep_weight and cost.dense_cost(shape) <= factored:
        return Folded(*known, weight=kron_weight(masked, a, b))
    m = masked * a
    if dropped.rows:
        m = m.index_select(1, rows)
    if dropped.columns:
        m = m.index_select(2, columns)
    m = m.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as layouts take it where B comes first: no copy each call
    return Folded(*known, m=m, rows=rows if dropped.rows else None, columns=columns if dropped.columns else None)
