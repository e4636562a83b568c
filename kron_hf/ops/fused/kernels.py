"""Triton kernels of the Kronecker-sparse product and of its gradients; imported by `launch` alone.

For the input u `[N, I * bi]`, factors M_i `[O, I]` and B_i `[bo, bi]`, M comes first:

    mix       T_i[p, t, j] = sum_q M_i[p, q] u[t, q, j]           one matrix product, columns (token, j)
    spread    v[t, p, l]   = sum_i sum_j T_i[p, t, j] B_i[l, j]   one matrix product, K runs over (i, j)

T stays in registers. The gradient of the input is the same product with transposed factors. It has V_i = M_i^T G as its
T, so that it gives dB_i on the way. Rows of T are (block row, i), so that all ranks share one load of u.

Tensor cores want K of 16 at least: small blocks of low rank get there by zeros between the columns of T (SPREAD), not
by more tokens a row, where one token that is not finite would spoil its neighbours. Sums over tokens are kept for a
range of tokens a program, and written as float32 partial sums that a second step adds up: without atomics the same
inputs give the same bits.

Offsets inside a tile are 32-bit, those of a tile's first token 64-bit. BLOCK_OUT and BLOCK_IN are bo and bi; PAD_OUT
and PAD_IN, the next powers of two or more; TILE_*, what a program owns or takes a step: tokens, block rows, block
columns, ranks.
"""

# pyright: reportMissingImports=false
# (triton: on Linux only)

import triton
import triton.language as tl

from kron_hf.ops.fused.steps import dot, load_blocks, mix, rows_by_token, stacked_b, store

__all__ = ["grad_m_kernel", "product_kernel", "transposed_product_kernel"]


@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    u_ptr,
    m_ptr,
    b_ptr,
    bias_ptr,
    v_ptr,
    tokens,
    out_blocks,
    in_blocks,
    m_rank_stride,
    m_out_stride,
    m_in_stride,
    b_rank_stride,
    b_out_stride,
    b_in_stride,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PAD_OUT: tl.constexpr,
    PAD_IN: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`v = sum_i u (M_i (x) B_i)^T + bias`; a program owns a tile of tokens and of block rows."""
    out_tiles = tl.cdiv(out_blocks, TILE_OUT)
    token_0 = tl.program_id(0) // out_tiles * TILE_TOKENS  # neighbours read the same tokens
    out_0 = tl.program_id(0) % out_tiles * TILE_OUT
    v = tl.zeros((TILE_OUT * TILE_TOKENS, PAD_OUT), tl.float32)
    for rank_0 in range(0, RANK, TILE_RANK):
        mixed = mix(
            *(u_ptr, m_ptr, token_0, tokens, out_0, out_blocks, in_blocks, rank_0),
            *(m_rank_stride, m_out_stride, m_in_stride, RANK, BLOCK_IN, PAD_IN),
            *(TILE_TOKENS, TILE_OUT, TILE_IN, TILE_RANK, PRECISION),
        )
        mixed = rows_by_token(mixed.to(u_ptr.dtype.element_ty), PAD_IN, SPREAD, TILE_TOKENS, TILE_OUT, TILE_RANK)
        b = stacked_b(
            *(b_ptr, rank_0, b_rank_stride, b_in_stride, b_out_stride),
            *(RANK, BLOCK_IN, BLOCK_OUT, PAD_IN, PAD_OUT, SPREAD, TILE_RANK),
        )
        v = dot(mixed, b, v, PRECISION)
    store(
        *(v_ptr, bias_ptr, v, token_0, tokens, out_0, out_blocks),
        *(HAS_BIAS, BLOCK_OUT, PAD_OUT, TILE_TOKENS, TILE_OUT),
    )


@triton.jit(do_not_specialize=["tokens", "tiles_a_program"])
def transposed_product_kernel(
    g_ptr,
    m_ptr,
    b_ptr,
    x_ptr,
    grad_x_ptr,
    partial_ptr,
    tokens,
    tiles_a_program,
    out_blocks,
    in_blocks,
    m_rank_stride,
    m_out_stride,
    m_in_stride,
    b_rank_stride,
    b_out_stride,
    b_in_stride,
    WRITE_GRAD_X: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PAD_OUT: tl.constexpr,
    PAD_IN: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of dB, and dX if asked for; names are those of the layer, not of the transposed one.

    A program owns a range of token tiles, a tile of block columns (TILE_IN), TILE_RANK ranks, and writes partial
    `[programs, rank, bo, bi]` at its place. dX is complete only where TILE_RANK covers all ranks.
    """
    in_tiles = tl.cdiv(in_blocks, TILE_IN)
    first_tile = tl.program_id(0) // in_tiles * tiles_a_program
    last_tile = tl.minimum(first_tile + tiles_a_program, tl.cdiv(tokens, TILE_TOKENS))
    in_0 = tl.program_id(0) % in_tiles * TILE_IN
    rank_0 = tl.program_id(1) * TILE_RANK
    grad_b = tl.zeros((TILE_RANK * PAD_OUT * SPREAD, PAD_IN), tl.float32)
    for tile in range(first_tile, last_tile):
        token_0 = tile * TILE_TOKENS
        v = mix(
            *(g_ptr, m_ptr, token_0, tokens, in_0, in_blocks, out_blocks, rank_0),
            *(m_rank_stride, m_in_stride, m_out_stride, RANK, BLOCK_OUT, PAD_OUT),
            *(TILE_TOKENS, TILE_IN, TILE_OUT, TILE_RANK, PRECISION),
        )
        v = rows_by_token(v.to(g_ptr.dtype.element_ty), PAD_OUT, SPREAD, TILE_TOKENS, TILE_IN, TILE_RANK)
        x = load_blocks(x_ptr, token_0, tokens, in_0, in_blocks, BLOCK_IN, PAD_IN, TILE_TOKENS, TILE_IN)
        grad_b = dot(tl.trans(v), x, grad_b, PRECISION)
        if WRITE_GRAD_X:
            b = stacked_b(
                *(b_ptr, rank_0, b_rank_stride, b_out_stride, b_in_stride),
                *(RANK, BLOCK_OUT, BLOCK_IN, PAD_OUT, PAD_IN, SPREAD, TILE_RANK),
            )
            zeros = tl.zeros((TILE_IN * TILE_TOKENS, PAD_IN), tl.float32)
            grad_x = dot(v, b, zeros, PRECISION)
            store(
                *(grad_x_ptr, grad_x_ptr, grad_x, token_0, tokens, in_0, in_blocks),
                *(False, BLOCK_IN, PAD_IN, TILE_TOKENS, TILE_IN),
            )
    row, column = tl.arange(0, TILE_RANK * PAD_OUT * SPREAD), tl.arange(0, PAD_IN)
    i, out_entry = rank_0 + row // (PAD_OUT * SPREAD), row // SPREAD % PAD_OUT
    row_valid = (i < RANK) & (out_entry < BLOCK_OUT) & (row % SPREAD == 0)
    tl.store(
        partial_ptr
        + tl.program_id(0).to(tl.int64) * (RANK * BLOCK_OUT * BLOCK_IN)
        + ((i * BLOCK_OUT + out_entry) * BLOCK_IN)[:, None]
        + column[None, :],
        grad_b,
        mask=row_valid[:, None] & (column < BLOCK_IN)[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "tiles_a_program"])
def grad_m_kernel(
    g_ptr,
    b_ptr,
    x_ptr,
    partial_ptr,
    tokens,
    tiles_a_program,
    out_blocks,
    in_blocks,
    b_rank_stride,
    b_out_stride,
    b_in_stride,
    RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PAD_OUT: tl.constexpr,
    PAD_IN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of `dM_i = sum_t U_i x^T` with `U_i = g B_i`, `[ranges of tokens, rank, O, I]`.

    A program owns a tile of dM (program 0), TILE_RANK ranks (program 1) and a range of token tiles (program 2).
    """
    in_tiles = tl.cdiv(in_blocks, TILE_IN)
    out_0 = tl.program_id(0) // in_tiles * TILE_OUT
    in_0 = tl.program_id(0) % in_tiles * TILE_IN
    rank_0 = tl.program_id(1) * TILE_RANK
    first_tile = tl.program_id(2) * tiles_a_program
    last_tile = tl.minimum(first_tile + tiles_a_program, tl.cdiv(tokens, TILE_TOKENS))
    b = stacked_b(
        *(b_ptr, rank_0, b_rank_stride, b_in_stride, b_out_stride),
        *(RANK, BLOCK_IN, BLOCK_OUT, PAD_IN, PAD_OUT, 1, TILE_RANK),
    )
    b = tl.trans(b)  # rows l, columns (i, j)
    column = tl.arange(0, TILE_TOKENS * PAD_IN)
    token, j = column // PAD_IN, column % PAD_IN
    in_block = in_0 + tl.arange(0, TILE_IN)
    in_features = in_blocks * BLOCK_IN
    x_offsets = (token * in_features + j)[:, None] + (in_block * BLOCK_IN)[None, :]
    x_valid = (j < BLOCK_IN)[:, None] & (in_block < in_blocks)[None, :]
    grad_m = tl.zeros((TILE_OUT * TILE_RANK, TILE_IN), tl.float32)
    for tile in range(first_tile, last_tile):
        token_0 = tile * TILE_TOKENS
        g = load_blocks(g_ptr, token_0, tokens, out_0, out_blocks, BLOCK_OUT, PAD_OUT, TILE_TOKENS, TILE_OUT)
        zeros = tl.zeros((TILE_OUT * TILE_TOKENS, TILE_RANK * PAD_IN), tl.float32)
        u = dot(g, b, zeros, PRECISION).to(x_ptr.dtype.element_ty)
        split = tl.reshape(u, (TILE_OUT, TILE_TOKENS, TILE_RANK, PAD_IN))
        u = tl.reshape(tl.permute(split, (0, 2, 1, 3)), (TILE_OUT * TILE_RANK, TILE_TOKENS * PAD_IN))
        x = tl.load(
            x_ptr + token_0.to(tl.int64) * in_features + x_offsets,
            mask=x_valid & (token < tokens - token_0)[:, None],
            other=0.0,
        )
        grad_m = dot(u, x, grad_m, PRECISION)
    row = tl.arange(0, TILE_OUT * TILE_RANK)
    out_block, i = out_0 + row // TILE_RANK, rank_0 + row % TILE_RANK
    row_valid = (out_block < out_blocks) & (i < RANK)
    entries = out_blocks * in_blocks
    tl.store(
        partial_ptr
        + tl.program_id(2).to(tl.int64) * (RANK * entries)
        + (i * entries + out_block * in_blocks)[:, None]
        + in_block[None, :],
        grad_m,
        mask=row_valid[:, None] & (in_block < in_blocks)[None, :],
    )
