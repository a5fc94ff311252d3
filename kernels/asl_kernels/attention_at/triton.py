"""Attention at positions as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asl_kernels.triton_math import LOG2_E, LOWEST, dot


@triton.jit  # type: ignore[untyped-decorator]
def rows_up_to(
    p_positions: tl.tensor, num_rows: tl.tensor, i_position: tl.tensor
) -> tl.tensor:
    """How many of the ascending positions are at most ``i_position``: bisection."""
    i_low = num_rows * 0
    i_high = num_rows
    while i_low < i_high:
        i_middle = (i_low + i_high) // 2
        b_up_to = tl.load(p_positions + i_middle) <= i_position
        i_low = tl.where(b_up_to, i_middle + 1, i_low)
        i_high = tl.where(b_up_to, i_high, i_middle)
    return i_low


# Sizes are not specialised on: one compiled kernel serves every prompt, and none is
# compiled while requests wait.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_queries", "num_keys", "window", "scale", "soft_cap"],
    # Those of several sequences lie one after another.
    do_not_specialize_on_alignment=["p_q_positions"],
)
def attention_at_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_q_positions: tl.tensor,
    p_k_positions: tl.tensor,
    p_sinks: tl.tensor,
    p_out: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    stride_q_token: tl.tensor,
    stride_q_head: tl.tensor,
    stride_k_token: tl.tensor,
    stride_k_head: tl.tensor,
    stride_v_token: tl.tensor,
    stride_v_head: tl.tensor,
    stride_out_token: tl.tensor,
    stride_out_head: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """Softmax over the keys at the positions that each query sees.

    A program takes ``BLOCK_ROWS`` queries of one head, and all keys that any of them
    sees, ``BLOCK_KEYS`` at a time.

    Shapes: q ``[n, H, D]``, k ``[T, H / GROUP, D]``, v ``[T, H / GROUP, Dv]``, out
    ``[n, H, Dv]``; positions int64 ``[n]`` and ``[T]``, ascending; sinks ``[H]`` or
    None. Strides in elements; addresses are computed in int64.
    Units: ``window`` in positions, ``scale``, ``soft_cap`` and sinks as natural logits.
    Bytes moved, a program: the keys and values that its queries see, once, and the
    queries and the result.
    FLOPs, a program: ``2 * BLOCK_ROWS * (D + Dv)`` and an exp2 for each of these keys.
    """
    i_block = tl.program_id(0)
    i_head = tl.program_id(1)
    o_rows = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < num_queries
    i_last = tl.minimum(i_block * BLOCK_ROWS + BLOCK_ROWS, num_queries) - 1
    b_at = tl.load(p_q_positions + o_rows, mask=m_rows, other=0)
    i_end = rows_up_to(p_k_positions, num_keys, tl.load(p_q_positions + i_last))
    i_start = num_keys * 0
    if HAS_WINDOW:
        i_from = tl.load(p_q_positions + i_block * BLOCK_ROWS) - window
        i_start = rows_up_to(p_k_positions, num_keys, i_from)

    o_dims = tl.arange(0, BLOCK_DIM)
    o_value_dims = tl.arange(0, BLOCK_VALUE_DIM)
    m_dims = o_dims < DIM
    m_value_dims = o_value_dims < VALUE_DIM
    p_rows = p_q + i_head.to(tl.int64) * stride_q_head
    b_q = tl.load(
        p_rows + o_rows.to(tl.int64)[:, None] * stride_q_token + o_dims[None, :],
        mask=m_rows[:, None] & m_dims[None, :],
        other=0.0,
    )
    i_kv_head = (i_head // GROUP).to(tl.int64)
    p_keys = p_k + i_kv_head * stride_k_head
    p_values = p_v + i_kv_head * stride_v_head

    b_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    if p_sinks is not None:
        # The sink is the first key; it has no value.
        i_sink = tl.load(p_sinks + i_head).to(tl.float32) * LOG2_E
        b_max = tl.zeros([BLOCK_ROWS], tl.float32) + i_sink
        b_sum += 1.0
    b_out = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    for i_from in range(i_start, i_end, BLOCK_KEYS):
        o_keys = i_from + tl.arange(0, BLOCK_KEYS)
        m_keys = o_keys < i_end
        b_key_at = tl.load(p_k_positions + o_keys, mask=m_keys, other=0)
        o_tokens = o_keys.to(tl.int64)
        b_k = tl.load(
            p_keys + o_tokens[None, :] * stride_k_token + o_dims[:, None],
            mask=m_keys[None, :] & m_dims[:, None],
            other=0.0,
        )
        b_logits = dot(b_q, b_k, None) * scale
        if HAS_CAP:
            # soft_cap * tanh(x / soft_cap)
            b_logits = soft_cap * (2 * tl.sigmoid(2 * b_logits / soft_cap) - 1)
        b_logits *= LOG2_E
        m_seen = m_keys[None, :] & (b_key_at[None, :] <= b_at[:, None])
        if HAS_WINDOW:
            m_seen &= b_key_at[None, :] > b_at[:, None] - window
        b_logits = tl.where(m_seen, b_logits, LOWEST)
        b_new = tl.maximum(b_max, tl.max(b_logits, 1))
        # Not of the difference alone: where a row has seen no key yet it is 0.
        b_weights = tl.where(m_seen, tl.exp2(b_logits - b_new[:, None]), 0.0)
        b_factor = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_factor + tl.sum(b_weights, 1)
        b_v = tl.load(
            p_values + o_tokens[:, None] * stride_v_token + o_value_dims[None, :],
            mask=m_keys[:, None] & m_value_dims[None, :],
            other=0.0,
        )
        b_out = dot(b_weights.to(b_v.dtype), b_v, b_out * b_factor[:, None])
        b_max = b_new
    # A row that sees nothing has a sum of 0, and gets 0.
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    p_rows = p_out + i_head.to(tl.int64) * stride_out_head
    tl.store(
        p_rows
        + o_rows.to(tl.int64)[:, None] * stride_out_token
        + o_value_dims[None, :],
        b_out,
        mask=m_rows[:, None] & m_value_dims[None, :],
    )


def block_sizes(
    dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and Triton's launch options, for one shape."""
    widest = max(16, triton.next_power_of_2(dim), triton.next_power_of_2(value_dim))
    rows, keys, warps, stages = 64, 32, 4, 3
    if dtype == torch.float32:
        # Without tensor cores the operands lie in registers.
        rows, keys, warps, stages = 16, 16, 4, 1
    elif widest > 128:
        keys, warps, stages = 16, 8, 3
    blocks = {
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
        "BLOCK_VALUE_DIM": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_ROWS": rows,
        "BLOCK_KEYS": keys,
    }
    return blocks, {"num_warps": warps, "num_stages": stages}


def attention_at(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    out: Tensor,
    window: int | None,
    soft_cap: float,
    sinks: Tensor | None,
) -> None:
    """See `asl_kernels.attention_at.attention_at`."""
    n, heads, dim = query.shape
    if n == 0 or heads == 0:
        return
    blocks, options = block_sizes(dim, values.shape[2], query.dtype)
    grid = (triton.cdiv(n, blocks["BLOCK_ROWS"]), heads)
    with torch.accelerator.device_index(query.device.index):
        attention_at_kernel[grid](
            query,
            keys,
            values,
            query_positions,
            key_positions,
            sinks,
            out,
            n,
            len(keys),
            window or 0,
            scale,
            soft_cap,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            out.stride(0),
            out.stride(1),
            GROUP=heads // keys.shape[1],
            DIM=dim,
            VALUE_DIM=values.shape[2],
            HAS_WINDOW=window is not None,
            HAS_CAP=soft_cap > 0,
            **blocks,
            **options,
        )
