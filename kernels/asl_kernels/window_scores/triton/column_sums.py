"""Column sums of the window's attention: the weight that each key gets."""

from __future__ import annotations

import triton
import triton.language as tl

from asl_kernels.triton_math import LOWEST
from asl_kernels.window_scores.triton.loading import (
    dot_products,
    keys_of,
    load_rows,
    program_of,
    query_offsets,
)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_tokens", "split_tokens", "num_heads", "num_columns"]
)
def mass_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_starts: tl.tensor,
    p_offset: tl.tensor,
    p_shift: tl.tensor,
    p_mass: tl.tensor,
    num_tokens: tl.tensor,
    split_tokens: tl.tensor,
    num_heads: tl.tensor,
    num_columns: tl.tensor,
    log2_scale: tl.tensor,
    stride_q_token: tl.tensor,
    stride_q_head: tl.tensor,
    stride_k_token: tl.tensor,
    stride_k_head: tl.tensor,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """Weights of each key before the window, summed over the rows of its KV head.

    Every row sees these keys, so there is no causal mask. A program takes the keys
    of one split, one request and KV head and ``BLOCK_ROWS`` rows, whose sums it keeps
    apart from those of the head's other rows. Offset and shift are those of
    `combine_kernel`.

    Shapes: q, k and starts as in `statistics_kernel`; offset and shift fp32
    ``[n, Hkv, R]``, mass fp32 ``[R / BLOCK_ROWS, Hkv, num_columns]``, where
    ``num_columns`` is the sum of all requests' M - W.
    Units: mass in rows of attention: a head's sums to at most R; ``log2_scale`` as in
    `statistics_kernel`.
    Bytes moved: K once (blocks of rows share it in cache), mass once, q and the
    statistics once a split.
    FLOPs: ``2 * (M - W) * Hkv * R * D`` and an exp2 for each of ``(M - W) * Hkv * R``
    weights, for each request.
    """
    ROWS: tl.constexpr = WINDOW * GROUP
    i_block, i_pair, i_head = program_of(num_heads, tl.cdiv(ROWS, BLOCK_ROWS))
    i_request = i_pair // num_heads
    i_first, num_keys = keys_of(p_starts, i_request, num_tokens)
    o_rows = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < ROWS
    o_q = query_offsets(
        i_request, i_head, o_rows, stride_q_token, stride_q_head, WINDOW, GROUP
    )
    b_q = o_q  # stands for rows that no block covers
    if BLOCK_DIM >= DIM:
        b_q = load_rows(p_q, o_q, m_rows, 0, DIM, BLOCK_DIM)
    o_stats = i_pair.to(tl.int64) * ROWS + o_rows
    b_offset = tl.load(p_offset + o_stats, mask=m_rows, other=0.0)
    b_shift = tl.load(p_shift + o_stats, mask=m_rows, other=LOWEST)

    first = tl.program_id(1) * split_tokens
    end = tl.minimum(first + split_tokens, num_keys - WINDOW)
    i_out = (i_block * num_heads + i_head).to(tl.int64) * num_columns
    p_out = p_mass + i_out + (i_first - i_request.to(tl.int64) * WINDOW)
    for start in range(first, end, BLOCK_KEYS):
        o_keys = start + tl.arange(0, BLOCK_KEYS)
        m_keys = o_keys < end
        b_dots = dot_products(
            p_q,
            p_k,
            b_q,
            o_q,
            m_rows,
            i_first,
            i_head,
            o_keys,
            m_keys,
            stride_k_token,
            stride_k_head,
            True,
            DIM,
            BLOCK_DIM,
            BLOCK_ROWS,
            BLOCK_KEYS,
        )
        b_bits = (b_dots - b_offset[None, :]) * log2_scale + b_shift[None, :]
        # No weight exceeds 1, however the rounding of huge dot products differs between
        # here and where the statistics were taken. Not a number stays so: queries or
        # keys that overflow must show.
        b_bits = tl.minimum(b_bits, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_weights = tl.exp2(b_bits)
        if ROWS % BLOCK_ROWS != 0:
            # Rows of 0 times keys at infinity.
            b_weights = tl.where(m_rows[None, :], b_weights, 0.0)
        tl.store(p_out + o_keys, tl.sum(b_weights, 1), mask=m_keys)
