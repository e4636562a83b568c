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

import torch
from torch import Tensor

__all__ = ["Layout", "TokenLast", "TokenMajor"]


class Layout(ABC):
    """The products above for factors m `[rank, O, I]` and b `[rank, bo, bi]`; Z and V are opaque to the caller."""

    def __init__(self, m: Tensor, b: Tensor) -> None:
        self.rank, self.out_blocks, self.in_blocks = m.shape
        self.block_out, self.block_in = b.shape[1:]
        # K runs over (block column, rank), the order in which Z leaves `expand`: no permute of Z is needed.
        self.m = m.permute(1, 2, 0).reshape(self.out_blocks, self.in_blocks * self.rank)

    @abstractmethod
    def expand(self, x: Tensor) -> Tensor:
        """Z from x `[n, I * bi]`."""

    @abstractmethod
    def contract(self, z: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes `sum_i M_i Z_i + bias` to out `[n, O * bo]`."""

    @abstractmethod
    def pull(self, g: Tensor) -> Tensor:
        """V from g `[n, O * bo]`."""

    @abstractmethod
    def finish(self, v: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes `sum_i V_i B_i + bias` to out `[n, I * bi]`."""

    @abstractmethod
    def grad_m(self, g: Tensor, z: Tensor, total: Tensor) -> None:
        """Adds dM to total, `[O, I * rank]`."""

    @abstractmethod
    def grad_b(self, v: Tensor, x: Tensor, total: Tensor) -> None:
        """Adds dB to total, `[rank * bo, bi]`."""

    def zero_grad_m(self, dtype: torch.dtype) -> Tensor:
        """What `grad_m` adds to."""
        return self.m.new_zeros(self.m.shape, dtype=dtype)

    def zero_grad_b(self, dtype: torch.dtype) -> Tensor:
        """What `grad_b` adds to."""
        return self.m.new_zeros(self.rank * self.block_out, self.block_in, dtype=dtype)

    def unpack_m(self, total: Tensor) -> Tensor:
        """The total of `grad_m` as `[rank, O, I]`."""
        return total.view(self.out_blocks, self.in_blocks, self.rank).permute(2, 0, 1)

    def unpack_b(self, total: Tensor) -> Tensor:
        """The total of `grad_b` as `[rank, bo, bi]`."""
        return total.view(self.rank, self.block_out, self.block_in)


class TokenMajor(Layout):
    """Z and V are `[n, I * rank, bo]`: B by one matrix product, M by one product a token. For blocks of 16 and more."""

    def __init__(self, m: Tensor, b: Tensor) -> None:
        super().__init__(m, b)
        self.b = b.reshape(self.rank * self.block_out, self.block_in)

    def expand(self, x: Tensor) -> Tensor:
        z = x.reshape(-1, self.block_in) @ self.b.T  # [n * I, rank * bo]
        return z.view(len(x), self.in_blocks * self.rank, self.block_out)

    def contract(self, z: Tensor, bias: Tensor | None, out: Tensor) -> None:
        m, y = self.m.expand(len(z), -1, -1), out.view(len(z), self.out_blocks, self.block_out)
        if bias is None:
            torch.bmm(m, z, out=y)
        else:
            torch.baddbmm(bias.view(self.out_blocks, self.block_out), m, z, out=y)

    def pull(self, g: Tensor) -> Tensor:
        return torch.bmm(self.m.T.expand(len(g), -1, -1), g.view(len(g), self.out_blocks, self.block_out))

    def finish(self, v: Tensor, bias: Tensor | None, out: Tensor) -> None:
        torch.mm(v.view(-1, self.rank * self.block_out), self.b, out=out.view(-1, self.block_in))
        if bias is not None:
            out += bias

    def grad_m(self, g: Tensor, z: Tensor, total: Tensor) -> None:
        g = g.view(-1, self.out_blocks, self.block_out).transpose(0, 1)
        _add_product(total, g.reshape(self.out_blocks, -1), z.transpose(0, 1).reshape(z.shape[1], -1).T)

    def grad_b(self, v: Tensor, x: Tensor, total: Tensor) -> None:
        _add_product(total, v.view(-1, self.rank * self.block_out).T, x.reshape(-1, self.block_in))


class TokenLast(Layout):
    """Z and V are `[I, rank * bo, n]`: M by one matrix product, B by one product a block column. For small blocks."""

    def __init__(self, m: Tensor, b: Tensor) -> None:
        super().__init__(m, b)
        self.b = b.reshape(self.rank * self.block_out, self.block_in)

    def expand(self, x: Tensor) -> Tensor:
        columns = x.view(len(x), self.in_blocks, self.block_in).permute(1, 2, 0)
        return torch.bmm(self.b.expand(self.in_blocks, -1, -1), columns)

    def contract(self, z: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _write_transposed(self.m @ z.view(self.m.shape[1], -1), bias, out)

    def pull(self, g: Tensor) -> Tensor:
        v = self.m.T @ g.T.reshape(self.out_blocks, -1)
        return v.view(self.in_blocks, self.rank * self.block_out, len(g))

    def finish(self, v: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _write_transposed(torch.bmm(self.b.T.expand(self.in_blocks, -1, -1), v), bias, out)

    def grad_m(self, g: Tensor, z: Tensor, total: Tensor) -> None:
        _add_product(total, g.T.reshape(self.out_blocks, -1), z.view(self.m.shape[1], -1).T)

    def grad_b(self, v: Tensor, x: Tensor, total: Tensor) -> None:
        rows = x.view(len(x), self.in_blocks, self.block_in).transpose(0, 1)
        total += torch.bmm(v, rows).sum(0, dtype=total.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where total may have a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _write_transposed(columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes columns, `[features, n]` in memory, to out `[n, features]`."""
    rows = columns.view(out.shape[1], out.shape[0]).T
    if bias is None:
        out.copy_(rows)
    else:
        torch.add(rows, bias, out=out)
