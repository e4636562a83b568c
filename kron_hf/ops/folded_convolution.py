"""The factors of a convolution as evaluation needs them: S inside A, or W itself."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kron_hf.factors import kron_sum
from kron_hf.ops.convolution import Convolution, cheapest_way, kron_conv2d
from kron_hf.ops.folded import Folded, tracked

__all__ = ["FoldedConvolution", "fold_convolution"]


@dataclass(frozen=True, eq=False)
class FoldedConvolution(Folded):
    """As `Folded`, for `KronConv2d`; it keeps all block rows and columns.

    Attributes:
        convolution: The geometry.
    """

    convolution: Convolution = field(kw_only=True)

    def __call__(self, x: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x `[N, I * bi, H, W]`, without gradients for the factors."""
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
    m = (s if dead_blocks is None else s.masked_fill(dead_blocks, 0.0)) * a
    known = (sources, marks, s.shape[0])
    way = cheapest_way(m.shape, b.shape, convolution.input_positions, m.device.type)
    if keep_weight and way == "build_w":
        return FoldedConvolution(*known, weight=kron_sum(m, b), convolution=convolution)
    return FoldedConvolution(*known, m=m, convolution=convolution)
