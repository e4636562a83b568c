"""The two steps of a Kronecker-sparse product, on one chunk of tokens, in two memory layouts.

With `M_i = S * A_i`, n tokens x `[n, I * bi]` and the gradient of the output g `[n, O * bo]`, the block factors B_i
come first:

    expand    Z_i = X B_i^T       contract  Y  = sum_i M_i Z_i
    pull      V_i = M_i^T G       finish    dX = sum_i V_i B_i
    grad_m    dM_i = sum_t G Z_i^T           grad_b    dB_i = sum_t V_i^T X

`W^T = sum_i M_i^T (x) B_i^T` has the same form. So the order "M first" needs no code of its own: it is `pull` and
`finish` of the transposed factors for the forward, and `expand`, `contract` with x and g exchanged for the backward.
"""

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor

__all__ = ["Layout", "TokenLast", "TokenMajor"]

_COPIED = 2**22  # bytes of g and Z that a token-major `grad_m` copies at once: fewer take longer, more are not faster


class Layout(ABC):
    """The products above for factors m `[rank, O, I]` and b `[rank, bo, bi]`.

    Z and V are opaque to the caller and share one buffer: `expand` and `pull` overwrite what either returned before,
    and `finish` the g that was prepared. Buffers live as long as the layout, since pages that the system hands out anew
    for each chunk cost more than the products.
    """

    def __init__(self, m: Tensor, b: Tensor) -> None:
        self.rank, self.out_blocks, self.in_blocks = m.shape
        self.block_out, self.block_in = b.shape[1:]
        # K runs over (block column, rank), the order in which Z leaves `expand`: no permute of Z is needed.
        self.m = m.permute(1, 2, 0).reshape(self.out_blocks, self.in_blocks * self.rank)
        self.b = b.reshape(self.rank * self.block_out, self.block_in)
        self._buffers: dict[str, Tensor] = {}

    def prepare(self, g: Tensor) -> Tensor:
        """The form of g `[n, O * bo]` that `pull` and `grad_m` take."""
        return g

    @abstractmethod
    def expand(self, x: Tensor) -> Tensor:
        """Z from x `[n, I * bi]`."""

    @abstractmethod
    def contract(self, z: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes `sum_i M_i Z_i + bias` to out `[n, O * bo]`."""

    @abstractmethod
    def pull(self, g: Tensor) -> Tensor:
        """V from the prepared g."""

    @abstractmethod
    def finish(self, v: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes `sum_i V_i B_i + bias` to out `[n, I * bi]`."""

    @abstractmethod
    def zero_grad_b(self, dtype: torch.dtype) -> Tensor:
        """What `grad_b` adds to."""

    @abstractmethod
    def grad_m(self, g: Tensor, z: Tensor, total: Tensor) -> None:
        """Adds dM for the prepared g to total, from `zero_grad_m`."""

    @abstractmethod
    def grad_b(self, v: Tensor, x: Tensor, total: Tensor) -> None:
        """Adds dB to total, from `zero_grad_b`."""

    def zero_grad_m(self, dtype: torch.dtype) -> Tensor:
        """What `grad_m` adds to."""
        return self.m.new_zeros(self.m.shape, dtype=dtype)

    def unpack_m(self, total: Tensor) -> Tensor:
        """The total of `grad_m` as `[rank, O, I]`."""
        return total.view(self.out_blocks, self.in_blocks, self.rank).permute(2, 0, 1)

    def unpack_b(self, total: Tensor) -> Tensor:
        """The total of `grad_b` as `[rank, bo, bi]`."""
        return total.view(-1, self.rank, self.block_out, self.block_in).sum(0)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory, the same for each chunk."""
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < prod(shape):
            kept = self._buffers[name] = self.m.new_empty(shape)
        return kept if kept.shape == shape else kept.flatten()[: prod(shape)].view(shape)


class TokenMajor(Layout):
    """Z and V are `[n, I * rank, bo]`: B by one matrix product, M by one product a token. For blocks of 16 and more."""

    def expand(self, x: Tensor) -> Tensor:  # noqa: D102
        z = self._buffer("between", len(x) * self.in_blocks, self.rank * self.block_out)
        torch.mm(x.view(-1, self.block_in), self.b.T, out=z)
        return z.view(len(x), self.in_blocks * self.rank, self.block_out)

    def contract(self, z: Tensor, bias: Tensor | None, out: Tensor) -> None:  # noqa: D102
        m, y = self.m.expand(len(z), -1, -1), out.view(len(z), self.out_blocks, self.block_out)
        if bias is None:
            torch.bmm(m, z, out=y)
        else:
            torch.baddbmm(bias.view(self.out_blocks, self.block_out), m, z, out=y)

    def pull(self, g: Tensor) -> Tensor:  # noqa: D102
        v = self._buffer("between", len(g), self.in_blocks * self.rank, self.block_out)
        return torch.bmm(self.m.T.expand(len(g), -1, -1), g.view(-1, self.out_blocks, self.block_out), out=v)

    def finish(self, v: Tensor, bias: Tensor | None, out: Tensor) -> None:  # noqa: D102
        torch.mm(v.view(-1, self.rank * self.block_out), self.b, out=out.view(-1, self.block_in))
        if bias is not None:
            out += bias

    def zero_grad_b(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.b.new_zeros(self.b.shape, dtype=dtype)

    def grad_m(self, g: Tensor, z: Tensor, total: Tensor) -> None:  # noqa: D102
        copied = (self.out_blocks + z.shape[1]) * self.block_out * z.element_size()  # a token
        parts = -(-len(g) * copied // _COPIED)
        size = -(-len(g) // parts)
        for g_part, z_part in zip(g.view(-1, self.out_blocks, self.block_out).split(size), z.split(size), strict=True):
            left, right = self._blocks_first("left", g_part), self._blocks_first("right", z_part)
            _add_product(total, left, right.T)

    def _blocks_first(self, name: str, parts: Tensor) -> Tensor:
        """Parts `[n, blocks, entries]` as `[blocks, n * entries]`."""
        n, blocks, entries = parts.shape
        return self._buffer(name, blocks, n, entries).copy_(parts.transpose(0, 1)).flatten(1)

    def grad_b(self, v: Tensor, x: Tensor, total: Tensor) -> None:  # noqa: D102
        _add_product(total, v.view(-1, self.rank * self.block_out).T, x.view(-1, self.block_in))


class TokenLast(Layout):
    """Z and V are `[I, rank * bo, n]`: M by one matrix product, B by one product a block column. For small blocks."""

    def prepare(self, g: Tensor) -> Tensor:  # noqa: D102
        columns = self._buffer("columns", g.shape[1], len(g)).copy_(g.T)
        return columns.view(self.out_blocks, self.block_out * len(g))

    def expand(self, x: Tensor) -> Tensor:  # noqa: D102
        z = self._buffer("between", self.in_blocks, self.rank * self.block_out, len(x))
        columns = x.view(len(x), self.in_blocks, self.block_in).permute(1, 2, 0)
        return torch.bmm(self.b.expand(self.in_blocks, -1, -1), columns, out=z)

    def contract(self, z: Tensor, bias: Tensor | None, out: Tensor) -> None:  # noqa: D102
        # Features vary the fastest in y: from there to out is a shorter way than from `[O, bo, n]`.
        y = self._buffer("out", self.block_out * len(out), self.out_blocks)
        torch.mm(z.view(self.m.shape[1], -1).T, self.m.T, out=y)
        y = y.view(self.block_out, len(out), self.out_blocks).permute(1, 2, 0)
        blocks = out.view(y.shape)
        if bias is None:
            blocks.copy_(y)
        else:
            torch.add(y, bias.view(y.shape[1:]), out=blocks)

    def pull(self, g: Tensor) -> Tensor:  # noqa: D102
        tokens = g.shape[1] // self.block_out
        v = self._buffer("between", self.m.shape[1], self.block_out * tokens)
        return torch.mm(self.m.T, g, out=v).view(self.in_blocks, self.rank * self.block_out, tokens)

    def finish(self, v: Tensor, bias: Tensor | None, out: Tensor) -> None:  # noqa: D102
        x = self._buffer("columns", self.in_blocks, self.block_in, len(out))
        torch.bmm(self.b.T.expand(self.in_blocks, -1, -1), v, out=x)
        _write_transposed(x, bias, out)

    def zero_grad_b(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.b.new_zeros(self.in_blocks, *self.b.shape, dtype=dtype)  # summed over block columns at the end

    def grad_m(self, g: Tensor, z: Tensor, total: Tensor) -> None:  # noqa: D102
        _add_product(total, g, z.view(self.m.shape[1], -1).T)

    def grad_b(self, v: Tensor, x: Tensor, total: Tensor) -> None:  # noqa: D102
        _add_product(total, v, x.view(len(x), self.in_blocks, self.block_in).transpose(0, 1))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where total may have a wider dtype."""
    if total.dtype != left.dtype:
        total += left @ right
    elif total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)


def _write_transposed(columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes columns, `[features, n]` in memory, to out `[n, features]`."""
    out.copy_(columns.view(out.shape[1], out.shape[0]).T)  # torch has a blocked kernel for this copy, not for the sum
    if bias is not None:
        out += bias
