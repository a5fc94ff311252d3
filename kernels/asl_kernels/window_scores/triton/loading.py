"""What the window-score kernels share: where queries and keys lie, and their products.

Names: b_ block, i_ index, m_ mask, o_ offset, p_ pointer; strides are in elements,
and addresses are computed in int64.

Requests are numbered in the order of their queries; each has WINDOW rows of those. The
keys of all requests lie one after the other.

R = W * H / Hkv rows of queries read one KV head. Of its group of G = H / Hkv query
heads, row r is head r % G at window token r // G.
"""

from __future__ import annotations

import triton
import triton.language as tl

from asl_kernels.triton_math import dot


@triton.jit  # type: ignore[untyped-decorator]
def program_of(
    num_heads: tl.tensor, ROW_BLOCKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Block of rows, request times KV head, and KV head along the grid's first axis.

    Programs that read the same keys come next to each other, then those that read
    the same tokens.
    """
    i_block = tl.program_id(0) % ROW_BLOCKS
    i_pair = tl.program_id(0) // ROW_BLOCKS
    return i_block, i_pair, i_pair % num_heads


@triton.jit  # type: ignore[untyped-decorator]
def keys_of(
    p_starts: tl.tensor, i_request: tl.tensor, num_tokens: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """A request's first key among those of all requests, and how many it has.

    ``p_starts`` is int64 ``[requests + 1]``; None: one request, of ``num_tokens``.
    """
    if p_starts is not None:
        i_first = tl.load(p_starts + i_request)
        num_keys = (tl.load(p_starts + i_request + 1) - i_first).to(tl.int32)
    else:
        i_first = i_request.to(tl.int64)  # of the only request: 0
        num_keys = num_tokens
    return i_first, num_keys


@triton.jit  # type: ignore[untyped-decorator]
def query_offsets(
    i_request: tl.tensor,
    i_head: tl.tensor,
    o_rows: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Offsets of a KV head's rows in a tensor ``[requests * W, H, ...]``."""
    o_tokens = i_request.to(tl.int64) * WINDOW + o_rows // GROUP
    o_heads = i_head.to(tl.int64) * GROUP + o_rows % GROUP
    return o_tokens * stride_token + o_heads * stride_head


@triton.jit  # type: ignore[untyped-decorator]
def key_offsets(
    i_first: tl.tensor,
    i_head: tl.tensor,
    o_keys: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
) -> tl.tensor:
    """Offsets of a request's keys; its first is key ``i_first`` (int64) of all."""
    return (i_first + o_keys) * stride_token + i_head.to(tl.int64) * stride_head


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(
    p_rows: tl.tensor,
    o_rows: tl.tensor,
    m_rows: tl.tensor,
    start: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> tl.tensor:
    """Elements from ``start`` on of rows at ``o_rows``; 0 outside."""
    o_dims = start + tl.arange(0, BLOCK_DIM)
    m_tile = m_rows[:, None] & (o_dims < DIM)[None, :]
    return tl.load(p_rows + o_rows[:, None] + o_dims[None, :], mask=m_tile, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def dot_products(
    p_q: tl.tensor,
    p_k: tl.tensor,
    b_q: tl.tensor,
    o_q: tl.tensor,
    m_rows: tl.tensor,
    i_first: tl.tensor,
    i_head: tl.tensor,
    o_keys: tl.tensor,
    m_keys: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    KEYS_FIRST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tl.tensor:
    """Products of rows and keys in fp32, ``[rows, keys]`` or, KEYS_FIRST, turned.

    ``b_q`` holds the rows where BLOCK_DIM covers them. Narrower blocks are read again
    and again from ``o_q``, so that neither rows nor keys are ever held whole.
    """
    o_k = key_offsets(i_first, i_head, o_keys, stride_token, stride_head)
    if BLOCK_DIM >= DIM:
        b_k = load_rows(p_k, o_k, m_keys, 0, DIM, BLOCK_DIM)
        if KEYS_FIRST:
            b_dots = dot(b_k, tl.trans(b_q), None)
        else:
            b_dots = dot(b_q, tl.trans(b_k), None)
    else:
        b_dots = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        if KEYS_FIRST:
            b_dots = tl.trans(b_dots)
        for start in range(0, DIM, BLOCK_DIM):
            b_part_q = load_rows(p_q, o_q, m_rows, start, DIM, BLOCK_DIM)
            b_part_k = load_rows(p_k, o_k, m_keys, start, DIM, BLOCK_DIM)
            if KEYS_FIRST:
                b_dots = dot(b_part_k, tl.trans(b_part_q), b_dots)
            else:
                b_dots = dot(b_part_q, tl.trans(b_part_k), b_dots)
    return b_dots
