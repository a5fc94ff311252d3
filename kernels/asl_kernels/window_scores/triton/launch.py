"""Launches the window-score kernels, in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from asl_kernels.triton_math import LOG2_E
from asl_kernels.window_scores.triton.column_sums import mass_kernel
from asl_kernels.window_scores.triton.pooling import average_kernel, reach_kernel
from asl_kernels.window_scores.triton.statistics import (
    combine_kernel,
    statistics_kernel,
)
from asl_kernels.window_scores.triton.tiles import (
    AVERAGE_BLOCK,
    COMBINE_ROWS,
    COMBINE_SPLITS,
    block_sizes,
    programs_of,
    split_tokens,
)


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """int64 ``[n + 1]`` on the device: each request's first key; None: only one.

    Never waits for the device.
    """
    if len(lengths) == 1:
        return None
    first = [0]
    for length in lengths:
        first.append(first[-1] + length)
    starts = torch.tensor(first, dtype=torch.int64, pin_memory=device.type == "cuda")
    return starts.to(device, non_blocking=True)


def window_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    pool_kernel: int,
    lengths: Sequence[int] | None = None,
    layer_score: Tensor | None = None,
    row_weights: Tensor | None = None,
    reach: int = 1,
    *,
    programs: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `asl_kernels.window_scores.window_scores`; arguments are checked there.

    All requests are scored in one launch of each kernel.

    Args:
        q: As there.
        k: As there.
        scale: As there.
        pool_kernel: As there.
        lengths: As there.
        layer_score: As there.
        row_weights: As there; they go into the exponents.
        reach: As there.
        programs: Programs to launch, about; None: as many as the GPU runs at a time.
            The result depends on it only in the order of fp32 sums.
        out: fp32 ``[Hkv, sum(M - W)]`` to write and return; None: a new one.
    """
    if lengths is None:
        lengths = (k.shape[0],)
    requests = len(lengths)
    window, heads, dim = q.shape[0] // requests, q.shape[1], q.shape[2]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    total, longest = k.shape[0], max(lengths)
    columns = total - requests * window
    scale = float(scale)  # Triton would compile an int of 1 in
    if scale < 0:
        # The maxima are those of the dot products: the scale must not turn them round.
        q, scale = -q, -scale
    log2_scale = scale * LOG2_E.value
    dtype = torch.promote_types(q.dtype, k.dtype)
    blocks, options = block_sizes(window, group, dim, dtype)
    row_blocks = triton.cdiv(window * group, blocks["BLOCK_ROWS"])
    programs = programs or programs_of(q.device)
    tokens = split_tokens(
        total, programs // (kv_heads * row_blocks), blocks["BLOCK_KEYS"]
    )

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    scores = empty(kv_heads, columns) if out is None else out
    mass = empty(row_blocks, kv_heads, columns)
    starts = _starts(lengths, k.device)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    shape = {"WINDOW": window, "GROUP": group, "DIM": dim}
    first_axis = row_blocks * kv_heads * requests
    # Triton launches on the current device.
    with torch.cuda.device(q.device if q.is_cuda else -1):
        num_rows = requests * kv_heads * window * group
        splits = triton.cdiv(longest, tokens)
        split_max, split_sum = empty(splits, num_rows), empty(splits, num_rows)
        offset, shift = empty(num_rows), empty(num_rows)
        statistics_kernel[(first_axis, splits)](
            q,
            k,
            starts,
            split_max,
            split_sum,
            longest,
            tokens,
            kv_heads,
            log2_scale,
            *strides,
            **shape,
            **blocks,
            **options,
        )
        combine_kernel[(triton.cdiv(num_rows, COMBINE_ROWS),)](
            split_max,
            split_sum,
            offset,
            shift,
            splits,
            num_rows,
            log2_scale,
            BLOCK_SPLITS=COMBINE_SPLITS,
            BLOCK_ROWS=COMBINE_ROWS,
        )
        if row_weights is not None:
            # In bits; row r of a head is at window token r // G.
            by_token = shift.view(requests, kv_heads, window, group)
            by_token.add_(row_weights.log2()[:, None])
        mass_kernel[(first_axis, triton.cdiv(longest - window, tokens))](
            q,
            k,
            starts,
            offset,
            shift,
            mass,
            longest,
            tokens,
            kv_heads,
            columns,
            log2_scale,
            *strides,
            **shape,
            **blocks,
            **options,
        )
        averages = scores if reach == 1 else empty(kv_heads, columns)
        grid = (triton.cdiv(longest - window, AVERAGE_BLOCK), requests)
        average_kernel[grid](
            mass,
            starts,
            averages,
            layer_score if reach == 1 else None,
            longest,
            kv_heads,
            columns,
            averages.stride(0),
            WINDOW=window,
            PARTS=row_blocks,
            POOL=pool_kernel,
            BLOCK=AVERAGE_BLOCK,
        )
        if reach > 1:
            reach_kernel[grid](
                averages,
                starts,
                scores,
                layer_score,
                longest,
                kv_heads,
                columns,
                scores.stride(0),
                WINDOW=window,
                REACH=reach,
                BLOCK=AVERAGE_BLOCK,
            )
    return scores
