"""W for the moment of a product, and the gradients of the factors from that of W.

Between the factors and W its entries lie in a table: a row for each place of M_i, a column for each of B_i, or the
other way round, since the short rows that small blocks would make are slow to compute and to copy.

On CPUs a small product or copy by several threads takes longer than by one, since they must be woken. So W of few
entries is made and reduced by calls that torch and MKL leave to one thread: products with vectors, copies of small
parts.
"""

import torch
from torch import Tensor

__all__ = ["build_weight", "factor_gradients"]

_SHORT = 16  # entries of a block up to which W comes from a table with a row for each of them, and
_SHORT_RUN = 4  # `bi`, up to which its gradient is reduced from one
_ALONE = 2**16  # entries of W, and
_ALONE_RANK = 8  # the rank, up to which one thread is faster
_PART = 2**15  # entries that torch copies by one thread


def build_weight(m: Tensor, b: Tensor) -> Tensor:
    """`sum_i m_i (x) b_i`, as `factors.kron_weight` for S inside m."""
    (_, out_blocks, in_blocks), (_, block_out, block_in) = m.shape, b.shape
    rows, columns = m.flatten(1), b.flatten(1)
    if block_out * block_in <= _SHORT:
        table = _sum_of_outer_products(columns, rows)
        by_rows = table.view(block_out, block_in, out_blocks, in_blocks).permute(2, 0, 3, 1)
    else:
        table = _sum_of_outer_products(rows, columns)
        by_rows = table.view(out_blocks, in_blocks, block_out, block_in).transpose(1, 2)
    return _contiguous(by_rows, m.dtype).view(out_blocks * block_out, in_blocks * block_in)


def factor_gradients(grad: Tensor, m: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of M `[rank, O, I]` and B `[rank, bo, bi]` from that of W, at least in float32."""
    (_, out_blocks, in_blocks), (_, block_out, block_in) = m.shape, b.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    by_rows = grad.reshape(out_blocks, block_out, in_blocks, block_in)
    if block_in <= _SHORT_RUN:
        table = _contiguous(by_rows.permute(1, 3, 0, 2), wide).view(block_out * block_in, out_blocks * in_blocks).T
    else:
        table = _contiguous(by_rows.transpose(1, 2), wide).view(out_blocks * in_blocks, block_out * block_in)
    rows, columns = m.flatten(1).to(wide), b.flatten(1).to(wide)
    if _alone(rows, columns):
        grad_m = torch.stack([torch.mv(table, column) for column in columns])
        grad_b = torch.stack([torch.mv(table.T, row) for row in rows])
    else:
        grad_m, grad_b = columns @ table.T, rows @ table
    return grad_m.view(m.shape), grad_b.view(b.shape)


def _sum_of_outer_products(rows: Tensor, columns: Tensor) -> Tensor:
    """`sum_i rows_i columns_i^T`."""
    if not _alone(rows, columns):
        return rows.T @ columns
    total = rows[0, :, None] @ columns[:1]
    for row, column in zip(rows[1:], columns[1:], strict=True):
        total.addmm_(row[:, None], column[None])
    return total


def _alone(rows: Tensor, columns: Tensor) -> bool:
    """Whether one of several threads is faster alone; other dtypes have more to convert."""
    small = rows.shape[1] * columns.shape[1] <= _ALONE and len(rows) <= _ALONE_RANK
    return small and rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.get_num_threads() > 1


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In one piece of memory: a copy where it is not, made in parts where it is small."""
    if tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    copy = tensor.new_empty(tensor.shape, dtype=dtype)
    if tensor.device.type != "cpu" or not _PART < tensor.numel() <= _ALONE:
        return copy.copy_(tensor)
    longest = max(range(tensor.dim()), key=tensor.size)
    size = tensor.size(longest)
    for start, length in ((0, size // 2), (size // 2, size - size // 2)):
        copy.narrow(longest, start, length).copy_(tensor.narrow(longest, start, length))
    return copy
