"""W for the moment of a product, and the gradients of the factors from that of W.

On CPUs a small product or copy by several threads takes longer than by one, since they must be woken. So W of few
entries is made and reduced by calls that torch and MKL leave to one thread: products with vectors, copies of small
parts.
"""

import torch
from torch import Tensor

__all__ = ["build_weight", "factor_gradients"]

_ALONE = 2**16  # entries of W, and
_ALONE_RANK = 8  # the rank, up to which one thread is faster
_PART = 2**15  # entries that torch copies by one thread


def build_weight(m: Tensor, b: Tensor) -> Tensor:
    """`sum_i m_i (x) b_i`, as `factors.kron_weight` for S inside m."""
    (_, out_blocks, in_blocks), (_, block_out, block_in) = m.shape, b.shape
    rows, columns = m.flatten(1), b.flatten(1)
    if _one_thread(rows, columns):
        blocks = rows[0, :, None] @ columns[:1]
        for row, column in zip(rows[1:], columns[1:], strict=True):
            blocks.addmm_(row[:, None], column[None])
    else:
        blocks = rows.T @ columns
    by_rows = blocks.view(out_blocks, in_blocks, block_out, block_in).transpose(1, 2)
    return _contiguous(by_rows).view(out_blocks * block_out, in_blocks * block_in)


def factor_gradients(grad: Tensor, m: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of M `[rank, O, I]` and B `[rank, bo, bi]` from that of W, at least in float32."""
    (_, out_blocks, in_blocks), (_, block_out, block_in) = m.shape, b.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    by_rows = grad.reshape(out_blocks, block_out, in_blocks, block_in).transpose(1, 2)
    blocks = _contiguous(by_rows).view(out_blocks * in_blocks, block_out * block_in).to(wide)
    rows, columns = m.flatten(1).to(wide), b.flatten(1).to(wide)
    if _one_thread(rows, columns):
        grad_m = torch.stack([torch.mv(blocks, column) for column in columns])
        grad_b = torch.stack([torch.mv(blocks.T, row) for row in rows])
    else:
        grad_m, grad_b = columns @ blocks.T, rows @ blocks
    return grad_m.view(m.shape), grad_b.view(b.shape)


def _one_thread(rows: Tensor, columns: Tensor) -> bool:
    small = rows.shape[1] * columns.shape[1] <= _ALONE and len(rows) <= _ALONE_RANK
    return small and rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.get_num_threads() > 1


def _contiguous(tensor: Tensor) -> Tensor:
    """A contiguous copy, in parts where it is small."""
    if tensor.device.type != "cpu" or not _PART < tensor.numel() <= _ALONE:
        return tensor.contiguous()
    copy, half = tensor.new_empty(tensor.shape), len(tensor) // 2
    copy[:half].copy_(tensor[:half])
    copy[half:].copy_(tensor[half:])
    return copy
