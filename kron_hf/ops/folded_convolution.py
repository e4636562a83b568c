"""The factors of a convolution for evaluation: S inside A, without channels that are all zero; or W itself."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kron_hf.factors import kron_sum
from kron_hf.ops.convolution import cheapest_way, kron_conv2d, way_costs
from kron_hf.ops.cost import Dropped
from kron_hf.ops.cpu_costs import cpu_costs
from kron_hf.ops.folded import Folded, tracked
from kron_hf.ops.geometry import Convolution

__all__ = ["FoldedConvolution", "fold_convolution", "worth_dropping"]

# As `cost._MARGIN`, for what the costs leave out, and what is lost when other work runs beside.
_MARGIN = 0.85


@dataclass(frozen=True, eq=False)
class FoldedConvolution(Folded):
    """As `Folded`, for `KronConv2d`; a weight that is kept is that between the living channels.

    Attributes:
        convolution: The geometry.
    """

    convolution: Convolution = field(kw_only=True)

    def __call__(self, x: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x `[N, I * bi, H, W]`, without gradients for the factors."""
        block_out, block_in = b.shape[1:3]
        if self.columns is not None:
            x = x.unflatten(1, (-1, block_in)).index_select(1, self.columns).flatten(1, 2)
        if self.rows is None:
            return self._of_living(x, b, bias)
        blocks = (self.out_blocks, block_out)
        living_bias = None if bias is None else bias.view(blocks)[self.rows].flatten()
        y = self._of_living(x, b, living_bias).unflatten(1, (-1, block_out))
        shape = (y.shape[0], *blocks, *y.shape[3:])
        out = y.new_zeros(shape) if bias is None else bias.to(y.dtype).view(*blocks, 1, 1).expand(shape).contiguous()
        return out.index_copy_(1, self.rows, y).flatten(1, 2)

    def _of_living(self, x: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        if self.m is not None:
            return kron_conv2d(x, self.m, b, bias, self.convolution)
        assert self.weight is not None
        x, padding = self.convolution.padded(x)
        return self.convolution(x, self.weight, bias, padding)


@torch.inference_mode(False)
@torch.no_grad()
def fold_convolution(
    s: Tensor,
    a: Tensor,
    b: Tensor,
    dead_blocks: Tensor | None,
    convolution: Convolution,
    *,
    keep_weight: bool = False,
) -> FoldedConvolution:
    """Folds factors.

    Args:
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi, kh, kw]`.
        dead_blocks: bool `[O, I]`, True where S counts as zero; or None.
        convolution: The geometry.
        keep_weight: Whether W may be kept where a convolution with it is the cheapest.

    Raises:
        ValueError: The factors were made in inference mode: torch does not say whether they are written to.
    """
    sources, marks = tracked((s, a, b, dead_blocks))
    masked = s if dead_blocks is None else s.masked_fill(dead_blocks, 0.0)
    living = masked != 0
    rows, columns = living.any(1).nonzero().flatten(), living.any(0).nonzero().flatten()
    dropped = worth_dropping(a, b, convolution.input_positions, len(rows), len(columns))
    m = masked * a
    if dropped.rows:
        m = m.index_select(1, rows)
    if dropped.columns:
        m = m.index_select(2, columns)
    way = cheapest_way(m.shape, b.shape, convolution.input_positions, m.device.type)
    weight = kron_sum(m, b) if keep_weight and way == "build_w" else None
    return FoldedConvolution(
        sources,
        marks,
        s.shape[0],
        m=m if weight is None else None,
        weight=weight,
        rows=rows if dropped.rows else None,
        columns=columns if dropped.columns else None,
        convolution=convolution,
    )


def worth_dropping(a: Tensor, b: Tensor, input_positions: int, living_rows: int, living_columns: int) -> Dropped:
    """Whether a convolution is cheaper without the block rows and columns of S that are all zero.

    As for linears, see `cost.worth_dropping`: living channels are gathered and written between dead ones, each a run of
    whole images. What is done once a call is not counted, so that neither the batch nor the size of images decides.
    """
    nothing = Dropped(rows=False, columns=False)
    if a.device.type != "cpu" or not living_rows:  # elsewhere the traffic has not been measured
        return nothing
    (rank, out_blocks, in_blocks), (block_out, block_in) = a.shape, b.shape[1:3]
    costs = cpu_costs(b.dtype, torch.get_num_threads())

    def cost(dropped: Dropped) -> float:
        rows = living_rows if dropped.rows else out_blocks
        columns = living_columns if dropped.columns else in_blocks
        m_shape = torch.Size((rank, rows, columns))
        gathered = costs.gather * columns * block_in * input_positions if dropped.columns else 0
        scattered = block_out * (costs.scatter * rows + costs.fill * out_blocks) if dropped.rows else 0
        return min(way_costs(m_shape, b.shape, input_positions).values()) + gathered + scattered

    options = [
        Dropped(rows, columns)
        for rows in {False, living_rows < out_blocks}
        for columns in {False, living_columns < in_blocks}
    ]
    best = min(options, key=cost)
    return best if cost(best) < _MARGIN * cost(nothing) else nothing
