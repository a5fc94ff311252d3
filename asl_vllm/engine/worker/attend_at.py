"""Attention of tokens with gaps between them over the keys of all tokens before."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

_TILE = 256
"""Queries at once: a tile reads keys up to its last position only."""


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

    Synchronises with the host.
    """
    ends = [min(start + _TILE, len(query)) for start in range(0, len(query), _TILE)]
    last = positions[[end - 1 for end in ends]].tolist()
    columns = torch.arange(len(keys), device=keys.device)
    for start, end, seen in zip(range(0, len(query), _TILE), ends, last, strict=True):
        mixed = scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            keys[: seen + 1].transpose(0, 1)[None],
            values[: seen + 1].transpose(0, 1)[None],
            attn_mask=columns[: seen + 1] <= positions[start:end, None],
            scale=scale,
            enable_gqa=True,
        )
        rows = output[start:end]
        rows.copy_(mixed[0].transpose(0, 1).reshape(rows.shape))
