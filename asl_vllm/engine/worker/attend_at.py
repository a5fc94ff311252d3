"""Attention of tokens with gaps between them over the keys of all tokens before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from asl_kernels.attention_at import attention_at
from asl_vllm.prefill import Known


def attend_at(
    query: torch.Tensor,
    positions: torch.Tensor,
    known: Sequence[Known],
    lengths: Sequence[int],
    scale: float,
    output: torch.Tensor,
) -> None:
    """Each query sees its sequence's keys up to its own position, that one included.

    One launch a sequence: each has enough rows to fill a device.

    Args:
        query: ``[n, H, D]``.
        positions: int64 ``[n]``, ascending within a sequence.
        known: Keys and values of all positions, of each sequence.
        lengths: Queries of each.
        scale: The factor on q k^T.
        output: Receives ``[n, H, Dv]``, in any shape of as many elements a row.
    """
    most = max(len(own.keys) for own in known)
    key_positions = torch.arange(most, device=query.device)
    out = output.view(len(query), query.shape[1], known[0].values.shape[2])
    ends = list(accumulate(lengths))
    for own, end, length in zip(known, ends, lengths, strict=True):
        rows = slice(end - length, end)
        attention_at(
            query[rows],
            own.keys,
            own.values,
            positions[rows],
            key_positions[: len(own.keys)],
            scale=scale,
            out=out[rows],
        )
