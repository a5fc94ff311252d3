"""Pooling of the column sums into the scores, and how far those reach."""

from __future__ import annotations

import triton
import triton.language as tl

from asl_kernels.window_scores.triton.loading import keys_of


@triton.jit  # type: ignore[untyped-decorator]
def scored_keys(
    p_starts: tl.tensor,
    num_tokens: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """First column of the program's request, its scored keys, and the program's own.

    These are ``BLOCK`` offsets from the request's first key, and their mask.
    """
    i_request = tl.program_id(1)
    i_first, num_keys = keys_of(p_starts, i_request, num_tokens)
    num_keys -= WINDOW
    i_column = i_first - i_request.to(tl.int64) * WINDOW
    o_keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return i_column, num_keys, o_keys, o_keys < num_keys


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_tokens", "num_heads", "num_columns", "stride_scores_head"]
)
def average_kernel(
    p_mass: tl.tensor,
    p_starts: tl.tensor,
    p_scores: tl.tensor,
    p_layer: tl.tensor,
    num_tokens: tl.tensor,
    num_heads: tl.tensor,
    num_columns: tl.tensor,
    stride_scores_head: tl.tensor,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Average of each key's ``POOL`` neighbours; those outside count as 0.

    A program takes ``BLOCK`` keys of a request and all KV heads, over which it sums up
    the layer score where ``p_layer`` is not None.

    Shapes: mass fp32 ``[PARTS, Hkv, num_columns]``, of which the parts are added up;
    scores fp32 ``[Hkv, num_columns]``, layer fp32 ``[num_columns]``; starts and
    ``num_columns`` as in `mass_kernel`.
    Units: as mass.
    Bytes moved: ``4 * (PARTS + 1) * Hkv * num_columns`` (neighbours are in cache), and
    ``4 * num_columns`` for the layer score.
    FLOPs: ``(PARTS * POOL + 2) * Hkv * num_columns``.
    """
    i_column, num_keys, o_keys, m_keys = scored_keys(
        p_starts, num_tokens, WINDOW, BLOCK
    )
    b_layer = tl.zeros([BLOCK], tl.float32)
    p_head = p_mass + i_column
    p_out = p_scores + i_column
    for _ in range(0, num_heads):
        b_sum = tl.zeros([BLOCK], tl.float32)
        p_part = p_head
        for _ in range(0, PARTS):
            # Unrolled, so that loads are under way together.
            for tap in tl.range(0, POOL, loop_unroll_factor=7):
                o_near = o_keys + (tap - POOL // 2)
                m_near = (o_near >= 0) & (o_near < num_keys)
                b_sum += tl.load(p_part + o_near, mask=m_near, other=0.0)
            p_part += num_heads.to(tl.int64) * num_columns
        b_score = b_sum / POOL
        tl.store(p_out + o_keys, b_score, mask=m_keys)
        b_layer += b_score
        p_head += num_columns
        p_out += stride_scores_head
    if p_layer is not None:
        tl.store(p_layer + i_column + o_keys, b_layer, mask=m_keys)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_tokens", "num_heads", "num_columns", "stride_scores_head"]
)
def reach_kernel(
    p_averages: tl.tensor,
    p_starts: tl.tensor,
    p_scores: tl.tensor,
    p_layer: tl.tensor,
    num_tokens: tl.tensor,
    num_heads: tl.tensor,
    num_columns: tl.tensor,
    stride_scores_head: tl.tensor,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Largest of the ``REACH`` averages of a request that end with a key's own.

    A program takes ``BLOCK`` keys of a request and all KV heads, over which it sums up
    the layer score where ``p_layer`` is not None.

    Shapes: averages fp32 ``[Hkv, num_columns]``; the others as in `average_kernel`.
    Units: as averages, at least 0.
    Bytes moved: ``8 * Hkv * num_columns`` (those before are in cache), and
    ``4 * num_columns`` for the layer score.
    FLOPs: ``REACH * Hkv * num_columns``.
    """
    i_column, _, o_keys, m_keys = scored_keys(p_starts, num_tokens, WINDOW, BLOCK)
    b_layer = tl.zeros([BLOCK], tl.float32)
    p_head = p_averages + i_column
    p_out = p_scores + i_column
    for _ in range(0, num_heads):
        b_score = tl.zeros([BLOCK], tl.float32)
        for tap in tl.range(0, REACH, loop_unroll_factor=8):
            o_before = o_keys - tap
            m_before = (o_before >= 0) & m_keys
            b_before = tl.load(p_head + o_before, mask=m_before, other=0.0)
            # Not a number stays so, as in `mass_kernel`.
            b_score = tl.maximum(b_score, b_before, propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_out + o_keys, b_score, mask=m_keys)
        b_layer += b_score
        p_head += num_columns
        p_out += stride_scores_head
    if p_layer is not None:
        tl.store(p_layer + i_column + o_keys, b_layer, mask=m_keys)
