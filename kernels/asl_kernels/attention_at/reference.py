"""Attention at positions in plain torch: the truth that kernels are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 256
"""Queries at once: a tile reads the keys that any of them sees only."""


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
    """See `asl_kernels.attention_at.attention_at`. Synchronises with the host."""
    for start in range(0, len(query), _TILE):
        positions = query_positions[start : start + _TILE]
        # Ascending: what the first of them sees first and the last sees last.
        edges = torch.searchsorted(key_positions, positions[[0, -1]], right=True)
        first, end = 0, int(edges[1])
        if window is not None:
            lowest = positions[:1] - window
            first = int(torch.searchsorted(key_positions, lowest, right=True))
        at = key_positions[first:end]
        seen = at <= positions[:, None]
        if window is not None:
            seen &= at > positions[:, None] - window
        _tile(
            query[start : start + _TILE],
            keys[first:end],
            values[first:end],
            seen,
            scale,
            out[start : start + _TILE],
            soft_cap,
            sinks,
        )


def _tile(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    scale: float,
    out: Tensor,
    soft_cap: float,
    sinks: Tensor | None,
) -> None:
    """One tile; ``seen`` bool ``[n, keys]``."""
    group = query.shape[1] // keys.shape[1]
    for head in range(keys.shape[1]):  # one head's logits at a time
        mine = slice(head * group, (head + 1) * group)
        q = query[:, mine].transpose(0, 1).float()
        logits = (q @ keys[:, head].float().T).mul_(scale)
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits.masked_fill_(~seen, float("-inf"))
        rest = torch.full((group, len(seen), 1), float("-inf"), device=query.device)
        if sinks is not None:
            rest = rest.copy_(sinks[mine].float()[:, None, None].expand_as(rest))
        weights = torch.cat([logits, rest], dim=-1).softmax(-1)[..., :-1]
        # The softmax of nothing at all is no number.
        mixed = weights.nan_to_num_() @ values[:, head].float()
        out[:, mine].copy_(mixed.transpose(0, 1))
