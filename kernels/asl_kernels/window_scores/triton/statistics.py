"""Softmax statistics of the window's rows: largest dot product, sum of the weights."""

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
    do_not_specialize=["num_tokens", "split_tokens", "num_heads"]
)
def statistics_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_starts: tl.tensor,
    p_max: tl.tensor,
    p_sum: tl.tensor,
    num_tokens: tl.tensor,
    split_tokens: tl.tensor,
    num_heads: tl.tensor,
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
    """Largest dot product of each row, and sum of the weights relative to it.

    A program takes the keys of one split, one request and KV head and ``BLOCK_ROWS``
    rows. Splits beyond a short request's keys say so: `LOWEST` and 0.

    Shapes: q ``[n * W, H, D]`` of n requests; k ``[sum(M), Hkv, D]``; starts
    int64 ``[n + 1]`` or None; max and sum fp32 ``[splits, n, Hkv, R]``.
    Units: max in dot products, before the scale; ``log2_scale`` in bits per dot
    product, at least 0.
    Bytes moved: K once (blocks of rows share it in cache), q once a split,
    ``8 * splits * n * Hkv * R``.
    FLOPs: ``2 * M * Hkv * R * D`` and an exp2 for each of ``M * Hkv * R`` logits, for
    each request.
    """
    ROWS: tl.constexpr = WINDOW * GROUP
    i_split = tl.program_id(1)
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
    b_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS], tl.float32)

    first = i_split * split_tokens
    end = tl.minimum(first + split_tokens, num_keys)
    # Every row sees the keys up to the window's first token: whole blocks of those
    # need no mask.
    seen_by_all = tl.minimum(num_keys - WINDOW + 1, end)
    unmasked = tl.maximum(seen_by_all - first, 0) // BLOCK_KEYS * BLOCK_KEYS
    for start in range(first, first + unmasked, BLOCK_KEYS):
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
            False,
            DIM,
            BLOCK_DIM,
            BLOCK_ROWS,
            BLOCK_KEYS,
        )
        b_new = tl.maximum(b_max, tl.max(b_dots, 1))
        b_weights = tl.exp2((b_dots - b_new[:, None]) * log2_scale)
        b_sum = b_sum * tl.exp2((b_max - b_new) * log2_scale) + tl.sum(b_weights, 1)
        b_max = b_new
    for start in range(first + unmasked, end, BLOCK_KEYS):
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
            False,
            DIM,
            BLOCK_DIM,
            BLOCK_ROWS,
            BLOCK_KEYS,
        )
        o_last = num_keys - WINDOW + o_rows // GROUP
        m_seen = (o_keys[None, :] <= o_last[:, None]) & m_keys[None, :]
        b_dots = tl.where(m_seen, b_dots, LOWEST)
        b_new = tl.maximum(b_max, tl.max(b_dots, 1))
        b_weights = tl.exp2((b_dots - b_new[:, None]) * log2_scale)
        b_weights = tl.where(m_seen, b_weights, 0.0)
        b_sum = b_sum * tl.exp2((b_max - b_new) * log2_scale) + tl.sum(b_weights, 1)
        b_max = b_new

    num_pairs = tl.num_programs(0) // tl.cdiv(ROWS, BLOCK_ROWS)
    o_out = (i_split.to(tl.int64) * num_pairs + i_pair) * ROWS + o_rows
    tl.store(p_max + o_out, b_max, mask=m_rows)
    tl.store(p_sum + o_out, b_sum, mask=m_rows)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_splits"]
)
def combine_kernel(
    p_max: tl.tensor,
    p_sum: tl.tensor,
    p_offset: tl.tensor,
    p_shift: tl.tensor,
    num_splits: tl.tensor,
    num_rows: tl.tensor,
    log2_scale: tl.tensor,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Statistics of all keys from those of the splits.

    Shapes: max and sum fp32 ``[splits, n * Hkv * R]``; offset and shift fp32
    ``[n * Hkv * R]``, for which ``exp2((dot - offset) * log2_scale + shift)`` is a
    weight of the softmax.
    Units: offset in dot products, shift in bits.
    Bytes moved: ``16 * splits * n * Hkv * R`` (twice, the second time from cache).
    FLOPs: about 4 for each statistic.
    """
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < num_rows
    b_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        o_splits = start + tl.arange(0, BLOCK_SPLITS)
        m_in = (o_splits < num_splits)[:, None] & m_rows[None, :]
        o_in = o_splits.to(tl.int64)[:, None] * num_rows + o_rows[None, :]
        b_part = tl.load(p_max + o_in, mask=m_in, other=LOWEST)
        b_max = tl.maximum(b_max, tl.max(b_part, 0))
    b_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        o_splits = start + tl.arange(0, BLOCK_SPLITS)
        m_in = (o_splits < num_splits)[:, None] & m_rows[None, :]
        o_in = o_splits.to(tl.int64)[:, None] * num_rows + o_rows[None, :]
        b_part = tl.load(p_max + o_in, mask=m_in, other=LOWEST)
        b_part_sum = tl.load(p_sum + o_in, mask=m_in, other=0.0)
        b_factor = tl.exp2((b_part - b_max[None, :]) * log2_scale)
        b_sum += tl.sum(b_part_sum * b_factor, 0)
    tl.store(p_offset + o_rows, b_max, mask=m_rows)
    b_sum = tl.where(m_rows, b_sum, 1.0)  # log2 of a padded row's 0 is no number
    tl.store(p_shift + o_rows, -tl.log2(b_sum), mask=m_rows)
