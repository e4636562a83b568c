"""Three ways to convolve with a Kronecker-sparse weight, and their gradients, from the factors alone.

With `M_i = S * A_i` over blocks of channels, an input of I blocks of bi channels and an output of O blocks of bo,
`y_j = sum_i sum_l M_i[j, l] (B_i * x_l)`, where `*` is a convolution:

- "b_first": every block of channels is convolved with all B_i, as one batch of `N * I` images, then M mixes the blocks.
- "m_first": M mixes the blocks, then the `N * O` images of `rank * bi` channels are convolved with B.
- "build_w": one convolution with W.

In the first two each step writes what the next one reads: no permute, no loop over groups, no grouped convolution.
Backward computes the first step (or W) again, so that nothing of the size of images is kept but the input.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from kron_hf.factors import kron_sum, to_blocks
from kron_hf.ops.geometry import Convolution, Pair

__all__ = ["BFirst", "BuildW", "Factors", "MFirst", "Product"]

Gradients = tuple[Tensor | None, Tensor, Tensor]


class Factors(NamedTuple):
    """m `[rank, O, I]`, S inside it, and b `[rank, bo, bi, kh, kw]`."""

    m: Tensor
    b: Tensor


class Product(ABC):
    """A way; `padding` is what the geometry leaves for the convolution to do."""

    def __init__(self, factors: Factors, convolution: Convolution, padding: Pair) -> None:
        self.m, self.b = factors
        (self.rank, self.out_blocks, self.in_blocks), (_, self.block_out, self.block_in, *_) = (
            self.m.shape,
            self.b.shape,
        )
        self.convolution, self.padding = convolution, padding

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """From `x [N, I * bi, H, W]` to `[N, O * bo, H', W']`."""

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Gradients:
        """The gradients for x (None if not needed), m and b."""


class BFirst(Product):
    """The block factors first."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        z = self._expand(self._blocks(x))
        y = torch.bmm(self._mixing().expand(x.shape[0], -1, -1), self._rows(z, x.shape[0]))
        return y.view(x.shape[0], self.out_blocks * self.block_out, *z.shape[2:])

    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Gradients:  # noqa: D102
        blocks = self._blocks(x)
        z = self._expand(blocks)
        g = grad.reshape(x.shape[0], self.out_blocks, -1)
        grad_mixing = torch.bmm(g, self._rows(z, x.shape[0]).transpose(1, 2)).sum(0)
        grad_z = torch.bmm(self._mixing().transpose(1, 2).expand(x.shape[0], -1, -1), g).view(z.shape)
        grad_blocks, grad_b = self.convolution.gradients(
            grad_z, blocks, self.b.flatten(0, 1), self.padding, [need_x, True]
        )
        grad_m = grad_mixing.view(self.out_blocks, self.in_blocks, self.rank).permute(2, 0, 1)
        return grad_blocks.reshape(x.shape) if need_x else None, grad_m, grad_b.reshape(self.b.shape)

    def _blocks(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * self.in_blocks, self.block_in, *x.shape[2:])

    def _expand(self, blocks: Tensor) -> Tensor:
        """`[N * I, rank * bo, H', W']`."""
        return self.convolution(blocks, self.b.flatten(0, 1), None, self.padding)

    def _rows(self, z: Tensor, images: int) -> Tensor:
        positions = z.shape[2] * z.shape[3]
        return z.reshape(images, self.in_blocks * self.rank, self.block_out * positions)

    def _mixing(self) -> Tensor:
        return self.m.permute(1, 2, 0).reshape(1, self.out_blocks, self.in_blocks * self.rank)


class MFirst(Product):
    """M first."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.convolution(self._mixed(x), self._kernels(), None, self.padding)
        return y.reshape(x.shape[0], self.out_blocks * self.block_out, *y.shape[2:])

    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Gradients:  # noqa: D102
        g = grad.reshape(x.shape[0] * self.out_blocks, self.block_out, *grad.shape[2:])
        grad_mixed, grad_kernels = self.convolution.gradients(
            g, self._mixed(x), self._kernels(), self.padding, [True, True]
        )
        grad_rows = grad_mixed.reshape(x.shape[0], self.out_blocks * self.rank, -1)
        grad_mixing = torch.bmm(grad_rows, self._rows(x).transpose(1, 2)).sum(0)
        grad_m = grad_mixing.view(self.out_blocks, self.rank, self.in_blocks).transpose(0, 1)
        grad_b = grad_kernels.unflatten(1, (self.rank, self.block_in)).transpose(0, 1)
        if not need_x:
            return None, grad_m, grad_b
        grad_x = torch.bmm(self._mixing().transpose(1, 2).expand(x.shape[0], -1, -1), grad_rows)
        return grad_x.view(x.shape), grad_m, grad_b

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.in_blocks, self.block_in * x.shape[2] * x.shape[3])

    def _mixed(self, x: Tensor) -> Tensor:
        """`[N * O, rank * bi, H, W]`."""
        mixed = torch.bmm(self._mixing().expand(x.shape[0], -1, -1), self._rows(x))
        return mixed.view(x.shape[0] * self.out_blocks, self.rank * self.block_in, *x.shape[2:])

    def _mixing(self) -> Tensor:
        return self.m.transpose(0, 1).reshape(1, self.out_blocks * self.rank, self.in_blocks)

    def _kernels(self) -> Tensor:
        return self.b.transpose(0, 1).flatten(1, 2)


class BuildW(Product):
    """W for the moment of the convolution."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.convolution(x, kron_sum(self.m, self.b), None, self.padding)

    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Gradients:  # noqa: D102
        grad_x, grad_weight = self.convolution.gradients(
            grad, x, kron_sum(self.m, self.b), self.padding, [need_x, True]
        )
        blocks = to_blocks(grad_weight, (self.block_out, self.block_in))
        grad_m = (self.b.flatten(1) @ blocks.T).view(self.m.shape)
        return grad_x if need_x else None, grad_m, (self.m.flatten(1) @ blocks).view(self.b.shape)
