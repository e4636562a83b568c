"""Convolutions with a Kronecker-sparse weight, from the factors, in plain PyTorch.

With `M_i = S * A_i` over blocks of channels, an input of I blocks of bi channels and an output of O blocks of bo, three
ways give `y_j = sum_i sum_l M_i[j, l] (B_i * x_l)`, where `*` is a convolution:

- "b_first": every block of channels is convolved with all B_i, as one batch of `N * I` images, then M mixes the blocks.
- "m_first": M mixes the blocks, then the `N * O` images of `rank * bi` channels are convolved with B.
- "build_w": one convolution with W.

In the first two each step writes what the next one reads: no permute, no loop over groups, no grouped convolution.
"""

from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_hf.factors import kron_sum

__all__ = ["Convolution", "Way", "cheapest_way", "kron_conv2d", "multiply_adds"]

Way = Literal["b_first", "m_first", "build_w"]
# What the factors must promise, in multiply-adds, before W is not built: convolutions with few channels run at a lower
# rate, and what lies between the two steps is written and read once more. On CPUs about 0.4 is even for 3 x 3 kernels,
# less for 1 x 1 (`python -m examples.benchmarks.run convolutions`).
_MARGIN = 1 / 3


class Convolution(NamedTuple):
    """The geometry of a convolution, all but its weight; the names are those of `nn.Conv2d`."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"

    @property
    def input_positions(self) -> int:
        """Positions of the input for one of the output, away from the edges."""
        return prod(self.stride)

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | str]:
        """The input with the padding that a convolution cannot do itself, and what is left for it to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._pads(), mode=self.padding_mode), (0, 0)

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

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] | str) -> Tensor:
        """One convolution of `x [N, in, H, W]` with a dense weight."""
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)


def cheapest_way(m_shape: torch.Size, b_shape: torch.Size, input_positions: int, device_type: str) -> Way:
    """The way with the fewest multiply-adds per position of the output.

    Neither the batch nor the size of the images decides, so that a program exported for any of them is the same.
    Building W once a call, which is as much as `rank` positions more, is not counted. On the meta device, where nothing
    is computed and FLOPs are counted, it is the cheaper of the two ways from the factors.
    """
    counts = multiply_adds(m_shape, b_shape, input_positions)
    factored: Way = "b_first" if counts["b_first"] <= counts["m_first"] else "m_first"
    return "build_w" if device_type != "meta" and counts[factored] > _MARGIN * counts["build_w"] else factored


def multiply_adds(m_shape: torch.Size, b_shape: torch.Size, input_positions: int) -> dict[Way, int]:
    """Of each way, per position of the output; to build W is not counted."""
    (rank, out_blocks, in_blocks), (_, block_out, block_in, *kernel) = m_shape, b_shape
    out_channels, in_channels, kernel_entries = out_blocks * block_out, in_blocks * block_in, prod(kernel)
    return {
        "b_first": rank * (kernel_entries * in_channels * block_out + out_channels * in_blocks),
        "m_first": rank * (input_positions * in_channels * out_blocks + kernel_entries * out_channels * block_in),
        "build_w": kernel_entries * in_channels * out_channels,
    }


def kron_conv2d(
    x: Tensor, m: Tensor, b: Tensor, bias: Tensor | None, convolution: Convolution, way: Way | None = None
) -> Tensor:
    """The convolution of x with `W = sum_i m_i (x) b_i`, plus the bias.

    Args:
        x: `[N, I * bi, H, W]`.
        m: `S * A_i`, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi, kh, kw]`.
        bias: `[O * bo]` or None.
        convolution: Its geometry.
        way: How to compute it; None is the cheapest way. All give the same up to rounding.

    Returns:
        `[N, O * bo, H', W']`.
    """
    x, padding = convolution.padded(x)
    way = way or cheapest_way(m.shape, b.shape, convolution.input_positions, x.device.type)
    if way == "build_w":
        return convolution(x, kron_sum(m, b), bias, padding)
    product = _b_first if way == "b_first" else _m_first
    y = product(x, m, b, convolution, padding)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def _b_first(x: Tensor, m: Tensor, b: Tensor, convolution: Convolution, padding: tuple[int, int] | str) -> Tensor:
    (images, _, *size), (rank, out_blocks, in_blocks), (_, block_out, block_in, *_) = x.shape, m.shape, b.shape
    z = convolution(x.reshape(images * in_blocks, block_in, *size), b.flatten(0, 1), None, padding)
    positions = z.shape[2] * z.shape[3]
    mixing = m.permute(1, 2, 0).reshape(1, out_blocks, in_blocks * rank)
    y = torch.bmm(mixing.expand(images, -1, -1), z.reshape(images, in_blocks * rank, block_out * positions))
    return y.view(images, out_blocks * block_out, z.shape[2], z.shape[3])


def _m_first(x: Tensor, m: Tensor, b: Tensor, convolution: Convolution, padding: tuple[int, int] | str) -> Tensor:
    (images, _, *size), (rank, out_blocks, in_blocks), (_, block_out, block_in, *_) = x.shape, m.shape, b.shape
    mixing = m.transpose(0, 1).reshape(1, out_blocks * rank, in_blocks)
    blocks = x.reshape(images, in_blocks, block_in * size[0] * size[1])
    mixed = torch.bmm(mixing.expand(images, -1, -1), blocks).view(images * out_blocks, rank * block_in, *size)
    y = convolution(mixed, b.transpose(0, 1).flatten(1, 2), None, padding)
    return y.reshape(images, out_blocks * block_out, y.shape[2], y.shape[3])
