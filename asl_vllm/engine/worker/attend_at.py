"""Attention of tokens with gaps between them over the keys of all tokens before."""

from __future__ import annotations

import torch

from asl_kernels.attention_at import attention_at


def attend_at(
    query: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Each query sees the keys up to its own position, that one included.

    Args:
        query: ``[n, H, D]``.
        positions: int64 ``[n]``, ascending.
        keys: ``[T, Hkv, D]``, of all positions.
        values: ``[T, Hkv, Dv]``.
        scale: The factor on q k^T.
        output: Receives ``[n, H, Dv]``, in any shape of as many elements a row.
    """
    attention_at(
        query,
        keys,
        values,
        positions,
        torch.arange(len(keys), device=keys.device),
        scale=scale,
        out=output.view(len(query), query.shape[1], values.shape[2]),
    )
