"""The geometry of a convolution, all but its weight."""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolution"]

Pair = tuple[int, int]


class Convolution(NamedTuple):
    """Kernel size, stride, padding, dilation and padding mode; the names are those of `nn.Conv2d`."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    @property
    def input_positions(self) -> int:
        """Positions of the input for one of the output, away from the edges."""
        return prod(self.stride)

    def padded(self, x: Tensor) -> tuple[Tensor, Pair]:
        """The input with the padding that a convolution cannot do itself, and what is left for it to do."""
        left, right, top, bottom = pads = self._pads()
        if self.padding_mode != "zeros":
            return F.pad(x, pads, mode=self.padding_mode), (0, 0)
        if (left, top) != (right, bottom):  # "same" around an even kernel
            return F.pad(x, pads), (0, 0)
        return x, (top, left)

    def _pads(self) -> list[int]:
        """Left, right, top, bottom, as `F.pad` takes them."""
        pads: list[int] = []
        for axis in (1, 0):
            if isinstance(self.padding, tuple):
                pads += [self.padding[axis]] * 2
            else:
                total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
                pads += [total // 2, total - total // 2]
        return pads

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair) -> Tensor:
        """One convolution of `x [N, in, H, W]` with a dense weight."""
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, padding: Pair, needed: list[bool]) -> list[Tensor]:
        """Those for x and the weight, in any memory format; None for one that is not needed."""
        nothing = (False, [0, 0], 1)  # not transposed, no output padding, no groups
        sizes = (None, list(self.stride), list(padding), list(self.dilation))
        return torch.ops.aten.convolution_backward(grad, x, weight, *sizes, *nothing, [*needed, False])[:2]
