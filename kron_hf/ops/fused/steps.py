"""The steps that the kernels share, each inlined where it is called; `kernels` says what the names mean."""

# pyright: reportMissingImports=false
# (triton: on Linux only)

import triton
import triton.language as tl
from triton import knobs

__all__ = ["dot", "load_blocks", "mix", "rows_by_token", "stacked_b", "store"]

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """`total + left @ right`, accumulated in float32."""
    if _INTERPRETED:  # the interpreter keeps bfloat16 as bits, and would multiply those
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def mix(
    u_ptr,
    m_ptr,
    token_0,
    tokens,
    out_0,
    out_blocks,
    in_blocks,
    rank_0,
    m_rank_stride,
    m_out_stride,
    m_in_stride,
    RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PAD_IN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T for a tile of tokens and block rows: float32, rows (block row, i), columns (token, j)."""
    row = tl.arange(0, TILE_OUT * TILE_RANK)
    out_block, i = out_0 + row // TILE_RANK, rank_0 + row % TILE_RANK
    row_valid = (out_block < out_blocks) & (i < RANK)
    m_rows = m_ptr + i * m_rank_stride + out_block * m_out_stride

    column = tl.arange(0, TILE_TOKENS * PAD_IN)
    token, j = column // PAD_IN, column % PAD_IN
    column_valid = (token < tokens - token_0) & (j < BLOCK_IN)
    features = in_blocks * BLOCK_IN
    u_columns = u_ptr + token_0.to(tl.int64) * features + (token * features + j)

    mixed = tl.zeros((TILE_OUT * TILE_RANK, TILE_TOKENS * PAD_IN), tl.float32)
    for in_0 in range(0, in_blocks, TILE_IN):
        in_block = in_0 + tl.arange(0, TILE_IN)
        in_valid = in_block < in_blocks
        m = tl.load(
            m_rows[:, None] + in_block[None, :] * m_in_stride, mask=row_valid[:, None] & in_valid[None, :], other=0.0
        )
        u = tl.load(
            u_columns[None, :] + in_block[:, None] * BLOCK_IN, mask=in_valid[:, None] & column_valid[None, :], other=0.0
        )
        mixed = dot(m, u, mixed, PRECISION)
    return mixed


@triton.jit
def rows_by_token(
    mixed,
    PAD_IN: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_RANK: tl.constexpr,
):
    """T as an operand of the second product: rows (block row, token), columns (i, j), SPREAD - 1 zeros after each."""
    if SPREAD >= 2:
        mixed = tl.reshape(tl.join(mixed, tl.zeros_like(mixed)), (TILE_OUT * TILE_RANK, TILE_TOKENS * PAD_IN * 2))
    if SPREAD == 4:
        mixed = tl.reshape(tl.join(mixed, tl.zeros_like(mixed)), (TILE_OUT * TILE_RANK, TILE_TOKENS * PAD_IN * 4))
    split = tl.reshape(mixed, (TILE_OUT, TILE_RANK, TILE_TOKENS, PAD_IN * SPREAD))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3)), (TILE_OUT * TILE_TOKENS, TILE_RANK * PAD_IN * SPREAD))


@triton.jit
def stacked_b(
    b_ptr,
    rank_0,
    b_rank_stride,
    b_row_stride,
    b_column_stride,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    PAD_COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE_RANK: tl.constexpr,
):
    """The B_i below one another: rows (i, row of B), SPREAD - 1 rows of zeros after each, columns those of B."""
    row, column = tl.arange(0, TILE_RANK * PAD_ROWS * SPREAD), tl.arange(0, PAD_COLUMNS)
    i, b_row = rank_0 + row // (PAD_ROWS * SPREAD), row // SPREAD % PAD_ROWS
    row_valid = (i < RANK) & (b_row < ROWS) & (row % SPREAD == 0)
    return tl.load(
        b_ptr + (i * b_rank_stride + b_row * b_row_stride)[:, None] + (column * b_column_stride)[None, :],
        mask=row_valid[:, None] & (column < COLUMNS)[None, :],
        other=0.0,
    )


@triton.jit
def load_blocks(
    u_ptr,
    token_0,
    tokens,
    block_0,
    blocks,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Rows (block, token), columns the entries of a block."""
    row, entry = tl.arange(0, TILE_BLOCKS * TILE_TOKENS), tl.arange(0, PAD)
    block, token = block_0 + row // TILE_TOKENS, row % TILE_TOKENS
    features = blocks * BLOCK
    return tl.load(
        u_ptr + token_0.to(tl.int64) * features + (token * features + block * BLOCK)[:, None] + entry[None, :],
        mask=((token < tokens - token_0) & (block < blocks))[:, None] & (entry < BLOCK)[None, :],
        other=0.0,
    )


@triton.jit
def store(
    v_ptr,
    bias_ptr,
    v,
    token_0,
    tokens,
    out_0,
    out_blocks,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PAD_OUT: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
):
    """Adds the bias and writes v, whose rows are (block row, token) and columns l."""
    split = tl.reshape(v, (TILE_OUT, TILE_TOKENS, PAD_OUT))
    v = tl.reshape(tl.permute(split, (1, 0, 2)), (TILE_TOKENS, TILE_OUT * PAD_OUT))  # whole rows: long writes
    column = tl.arange(0, TILE_OUT * PAD_OUT)
    out_block, entry = out_0 + column // PAD_OUT, column % PAD_OUT
    feature, valid = out_block * BLOCK_OUT + entry, (out_block < out_blocks) & (entry < BLOCK_OUT)
    if HAS_BIAS:
        v += tl.load(bias_ptr + feature, mask=valid, other=0.0).to(tl.float32)[None, :]
    token = tl.arange(0, TILE_TOKENS)
    features = out_blocks * BLOCK_OUT
    tl.store(
        v_ptr + token_0.to(tl.int64) * features + (token[:, None] * features + feature[None, :]),
        v.to(v_ptr.dtype.element_ty),
        mask=(token < tokens - token_0)[:, None] & valid[None, :],
    )
