"""Window scores: how much the last prompt tokens attend to each earlier one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asl_kernels.checks import (
    check_device,
    check_dtype,
    check_rows_contiguous,
    check_shape,
)
from asl_kernels.window_scores import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def window_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    pool_kernel: int,
    lengths: Sequence[int] | None = None,
    layer_score: Tensor | None = None,
    row_weights: Tensor | None = None,
    reach: int = 1,
) -> Tensor:
    """Scores the tokens before the observation window, per KV head.

    Softmax over causal keys in fp32, summed over the window's rows, average-pooled
    over positions (padding counted), summed over each KV head's query group. A score
    then reaches forward: a token has the largest of ``reach`` scores, its own the last
    of them. On a GPU, Triton kernels do the work; elsewhere, plain torch.

    Several requests may be scored at once, none of which sees another's keys: their
    queries and keys are packed, and ``lengths`` says which are whose.

    Bytes moved: K twice, and about ``12 * Hkv * (M - W)`` for sums before and after
    pooling. FLOPs: ``4 * M * H * W * D``.

    Args:
        q: ``[n * W, H, D]`` queries of the last W tokens of each of n requests (one,
            without ``lengths``), rotary applied; fp32, bf16, fp16.
        k: ``[sum(M), Hkv, D]`` keys of all tokens of each, M > W, H a multiple of
            Hkv; query head h reads KV head ``h // (H // Hkv)``. May be strided in all
            but the last dimension.
        scale: Factor of the logits, usually ``D ** -0.5``.
        pool_kernel: Width of the pooling in tokens; odd.
        lengths: M of each request; None: there is one.
        layer_score: fp32 ``[sum(M - W)]``, contiguous; gets the scores' sum over the
            KV heads, without a kernel of its own on a GPU.
        row_weights: fp32 ``[W]``, above 0 and up to 1 (not checked, since that would
            wait for the device): factors of the window's rows in their sum. None: 1.
        reach: Tokens whose largest score a token gets, the last of which it is; 1: its
            own alone.

    Returns:
        fp32 ``[Hkv, sum(M - W)]``, requests one after the other.

    Raises:
        ValueError: A shape, dtype, stride or device that does not fit.

    Source: arXiv 2601.07667, section 3 (the scoring is SnapKV's); ``reach`` is this
    repository's.
    """
    check_shape("q", q, "[n * W, H, D]", None, None, None)
    check_shape("k", k, "[sum(M), Hkv, D]", None, None, q.shape[2])
    check_dtype("k", k, *_DTYPES)
    if lengths is not None and sum(lengths) != k.shape[0]:
        raise ValueError(
            f"lengths: got {sum(lengths)} tokens in all; k has {k.shape[0]}."
        )
    _check(q, k, [k.shape[0]] if lengths is None else lengths, pool_kernel)
    if reach < 1:
        raise ValueError(f"reach: got {reach}; allowed: at least 1.")
    requests = 1 if lengths is None else len(lengths)
    _check_extras(q, requests, k.shape[0], row_weights, layer_score)
    arguments = q, k, scale, pool_kernel, lengths, layer_score, row_weights, reach
    if q.is_cuda:
        # Here, so that a CPU build of torch needs no Triton.
        from asl_kernels.window_scores import triton

        return triton.window_scores(*arguments)
    return reference.window_scores(*arguments)


def _check(q: Tensor, k: Tensor, lengths: Sequence[int], pool_kernel: int) -> None:
    """Checks queries and keys."""
    rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    check_dtype("q", q, *_DTYPES)
    check_device("k", k, q.device)
    check_rows_contiguous("q", q)
    check_rows_contiguous("k", k)
    if min(rows, heads, *k.shape[1:]) == 0:
        raise ValueError(
            f"q, k: got shapes {tuple(q.shape)}, {tuple(k.shape)}; no size may be 0."
        )
    if len(lengths) == 0 or rows % len(lengths):
        raise ValueError(
            f"lengths: got {len(lengths)} requests; wanted a divisor of q's {rows} "
            "rows, at least 1."
        )
    window = rows // len(lengths)
    if min(lengths) <= window:
        raise ValueError(
            f"k: got M = {min(lengths)} tokens; wanted more than W = {window}."
        )
    if heads % kv_heads:
        raise ValueError(f"q: got H = {heads}; wanted a multiple of Hkv = {kv_heads}.")
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel: got {pool_kernel}; allowed: odd, at least 1.")


def _check_extras(
    q: Tensor,
    requests: int,
    tokens: int,
    row_weights: Tensor | None,
    layer_score: Tensor | None,
) -> None:
    """Checks the optional tensors."""
    if row_weights is not None:
        check_shape("row_weights", row_weights, "[W]", q.shape[0] // requests)
        check_dtype("row_weights", row_weights, torch.float32)
        check_device("row_weights", row_weights, q.device)
    if layer_score is not None:
        columns = tokens - q.shape[0]
        check_shape("layer_score", layer_score, "[sum(M - W)]", columns)
        check_dtype("layer_score", layer_score, torch.float32)
        check_device("layer_score", layer_score, q.device)
        check_rows_contiguous("layer_score", layer_score)


__all__ = ["window_scores"]
