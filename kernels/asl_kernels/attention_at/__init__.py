"""Attention of tokens at positions: the mask goes by position, not by row."""

from __future__ import annotations

import torch
from torch import Tensor

from asl_kernels.attention_at import reference
from asl_kernels.checks import (
    check_device,
    check_dtype,
    check_rows_contiguous,
    check_shape,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention_at(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    scale: float,
    out: Tensor,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Attention over rows with gaps between their positions.

    A query at position p sees the keys at positions above ``p - window`` and up to p.
    Attention kernels count rows instead: where tokens between rows are missing their
    windows reach too far, and a query that is no row of the keys sees wrong ones.

    Softmax in fp32. Never synchronises with the host on a GPU, where a Triton kernel
    does the work; it looks for each block of queries' keys by bisection and reads no
    others.

    Bytes moved: about ``(n / 64) * s * (D + Dv)`` elements of each KV head's keys and
    values for each of its query heads, most of them from cache, where a query sees s
    keys. FLOPs: ``2 * n * s * H * (D + Dv)``.

    Args:
        query: ``[n, H, D]``, rotary applied; fp32, bf16, fp16.
        keys: ``[T, Hkv, D]``, H a multiple of Hkv; query head h reads KV head
            ``h // (H // Hkv)``. May be strided in all but the last dimension, as
            query, values and ``out`` may.
        values: ``[T, Hkv, Dv]``.
        query_positions: int64 ``[n]``, ascending.
        key_positions: int64 ``[T]``, strictly ascending.
        scale: Factor of the logits, usually ``D ** -0.5``.
        out: ``[n, H, Dv]``; receives the result. A query that sees no key gets 0.
        window: Positions that a query sees, its own included; None: all before it.
        soft_cap: Above 0: logits x become ``soft_cap * tanh(x / soft_cap)``.
        sinks: Floating point ``[H]``: a logit for each head of a key without a value,
            which takes part in the softmax; neither scaled nor capped.

    Raises:
        ValueError: A shape, dtype, stride, device or number that does not fit.
    """
    check_shape("query", query, "[n, H, D]", None, None, None)
    n, heads, dim = query.shape
    check_shape("keys", keys, "[T, Hkv, D]", None, None, dim)
    tokens, kv_heads, _ = keys.shape
    check_shape("values", values, "[T, Hkv, Dv]", tokens, kv_heads, None)
    check_shape("out", out, "[n, H, Dv]", n, heads, values.shape[2])
    check_shape("query_positions", query_positions, "[n]", n)
    check_shape("key_positions", key_positions, "[T]", tokens)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query: got {heads} heads; wanted a multiple of the {kv_heads} KV heads."
        )
    check_dtype("query", query, *_DTYPES)
    for name, tensor in (("keys", keys), ("values", values), ("out", out)):
        check_dtype(name, tensor, query.dtype)
    given = {
        "keys": keys,
        "values": values,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "out": out,
    }
    for name in ("query_positions", "key_positions"):
        check_dtype(name, given[name], torch.int64)
    for name, tensor in given.items():
        check_device(name, tensor, query.device)
        check_rows_contiguous(name, tensor)
    check_rows_contiguous("query", query)
    if sinks is not None:
        check_shape("sinks", sinks, "[H]", heads)
        check_dtype("sinks", sinks, *_DTYPES)
        check_device("sinks", sinks, query.device)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}; allowed: at least 1, or None.")
    if soft_cap < 0:
        raise ValueError(f"soft_cap: got {soft_cap}; allowed: 0 (none) or above.")
    arguments = (
        query,
        keys,
        values,
        query_positions,
        key_positions,
        scale,
        out,
        window,
        soft_cap,
        sinks,
    )
    if query.is_cuda:
        # Here, so that a CPU build of torch needs no Triton.
        from asl_kernels.attention_at import triton

        triton.attention_at(*arguments)
        return
    reference.attention_at(*arguments)


__all__ = ["attention_at"]
