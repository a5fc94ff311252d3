"""The gathers as Triton kernels that copy bits, whatever the dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes an element -> the integer that carries its bits."""
TILE_BYTES = 4096
"""Of a tile: two loads of 16 bytes for each of a program's 128 threads."""
MAX_TILE = 2048
"""Elements of a tile; more would need too many registers where rows are strided."""


@triton.jit  # type: ignore[untyped-decorator]
def copy_rows(
    p_source: tl.tensor,
    p_out: tl.tensor,
    b_token: tl.tensor,
    b_slot: tl.tensor,
    m_slot: tl.tensor,
    i_head: tl.tensor,
    i_heads: tl.tensor,
    i_columns: tl.tensor,
    i_source_token: tl.tensor,
    i_source_head: tl.tensor,
    i_source_column: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Copies a tile of one head's rows: those of ``b_token`` to ``b_slot``.

    ``p_source`` is [M, ``i_heads``, ``i_columns``] with ``i_source_*`` as strides in
    elements, ``p_out`` is contiguous [K, ``i_heads``, ``i_columns``]; both are
    addressed in int64.
    """
    b_column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_tile = m_slot[:, None] & (b_column < i_columns)[None, :]
    b_from = (b_token * i_source_token + i_head * i_source_head)[:, None]
    b_from += (b_column.to(tl.int64) * i_source_column)[None, :]
    b_to = ((b_slot * i_heads + i_head) * i_columns)[:, None] + b_column[None, :]
    tl.store(p_out + b_to, tl.load(p_source + b_from, m_tile, other=0), m_tile)


# How many tokens a request keeps is not specialised on: a model needs one compiled
# kernel, whatever its requests' budgets.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["i_kept", "i_kept_head"]
)
def gather_kernel(
    p_source: tl.tensor,
    p_kept: tl.tensor,
    p_out: tl.tensor,
    i_kept: tl.tensor,
    i_heads: tl.tensor,
    i_columns: tl.tensor,
    i_source_token: tl.tensor,
    i_source_head: tl.tensor,
    i_source_column: tl.tensor,
    i_kept_head: tl.tensor,
    i_kept_slot: tl.tensor,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gathers rows of one tensor: ``p_out[i, h] = p_source[p_kept[h, i], h]``.

    Program (x, h, z) takes SLOTS rows of head h and COLUMNS of their elements.
    ``p_kept`` is int64 [``i_heads``, ``i_kept``]; the rest as in `copy_rows`.

    Bytes moved: 2 x K x Hkv x columns x element size, and 8 x K x Hkv (x programs
    along z) for the tokens. FLOPs: none.
    """
    i_head = tl.program_id(1).to(tl.int64)
    b_slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    m_slot = b_slot < i_kept
    p_token = p_kept + i_head * i_kept_head + b_slot * i_kept_slot
    b_token = tl.load(p_token, mask=m_slot, other=0)
    copy_rows(
        p_source,
        p_out,
        b_token,
        b_slot,
        m_slot,
        i_head,
        i_heads,
        i_columns,
        i_source_token,
        i_source_head,
        i_source_column,
        COLUMNS,
    )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["i_kept", "i_kept_head"]
)
def gather_pair_kernel(
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_kept: tl.tensor,
    p_k_out: tl.tensor,
    p_v_out: tl.tensor,
    i_kept: tl.tensor,
    i_heads: tl.tensor,
    i_k_columns: tl.tensor,
    i_v_columns: tl.tensor,
    i_k_token: tl.tensor,
    i_k_head: tl.tensor,
    i_k_column: tl.tensor,
    i_v_token: tl.tensor,
    i_v_head: tl.tensor,
    i_v_column: tl.tensor,
    i_kept_head: tl.tensor,
    i_kept_slot: tl.tensor,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """`gather_kernel` for K and V in one launch that reads the tokens once.

    Bytes moved: 2 x K x Hkv x (D + Dv) x element size + 8 x K x Hkv. FLOPs: none.
    """
    i_head = tl.program_id(1).to(tl.int64)
    b_slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    m_slot = b_slot < i_kept
    p_token = p_kept + i_head * i_kept_head + b_slot * i_kept_slot
    b_token = tl.load(p_token, mask=m_slot, other=0)
    copy_rows(
        p_k,
        p_k_out,
        b_token,
        b_slot,
        m_slot,
        i_head,
        i_heads,
        i_k_columns,
        i_k_token,
        i_k_head,
        i_k_column,
        COLUMNS,
    )
    copy_rows(
        p_v,
        p_v_out,
        b_token,
        b_slot,
        m_slot,
        i_head,
        i_heads,
        i_v_columns,
        i_v_token,
        i_v_head,
        i_v_column,
        COLUMNS,
    )


def gather_kept(k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """See `asl_kernels.gather_kept.gather_kept`."""
    kv_heads, count = kept.shape
    k_out = torch.empty(count, kv_heads, k.shape[2], dtype=k.dtype, device=k.device)
    v_out = torch.empty(count, kv_heads, v.shape[2], dtype=v.dtype, device=v.device)
    k_words, v_words = as_words(k), as_words(v)
    widest = max(k_words.shape[2], v_words.shape[2])
    if kept.numel() == 0 or widest == 0:
        return k_out, v_out
    slots, columns = tile(widest, k_words.element_size())
    grid = (triton.cdiv(count, slots), kv_heads, triton.cdiv(widest, columns))
    with torch.accelerator.device_index(k.device.index):
        gather_pair_kernel[grid](
            k_words,
            v_words,
            kept,
            as_words(k_out),
            as_words(v_out),
            count,
            kv_heads,
            k_words.shape[2],
            v_words.shape[2],
            *k_words.stride(),
            *v_words.stride(),
            *kept.stride(),
            SLOTS=slots,
            COLUMNS=columns,
            num_warps=4,
        )
    return k_out, v_out


def gather_tokens(hidden: Tensor, kept: Tensor) -> Tensor:
    """See `asl_kernels.gather_kept.gather_tokens`."""
    (count,) = kept.shape
    out = torch.empty(count, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    words = as_words(hidden)
    slots, columns = tile(words.shape[1], words.element_size())
    grid = (triton.cdiv(count, slots), 1, triton.cdiv(words.shape[1], columns))
    with torch.accelerator.device_index(hidden.device.index):
        gather_kernel[grid](
            words,
            kept,
            as_words(out),
            count,
            1,
            words.shape[1],
            words.stride(0),
            0,
            words.stride(1),
            0,
            kept.stride(0),
            SLOTS=slots,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def as_words(tensor: Tensor) -> Tensor:
    """The same bits as integers: not every GPU can load every dtype as it is."""
    if tensor.element_size() not in WORDS:  # complex128 becomes two words.
        return tensor.contiguous().view(torch.int64)
    return tensor.view(WORDS[tensor.element_size()])


def tile(columns: int, element_size: int) -> tuple[int, int]:
    """Rows and elements of a row that a program takes, both powers of two."""
    elements = min(MAX_TILE, TILE_BYTES // element_size)
    width = min(elements, triton.next_power_of_2(columns))
    return elements // width, width
