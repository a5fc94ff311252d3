"""The tokens that are selected: the highest scoring ones, and the last ones."""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores; of equal ones the later are taken.

    Args:
        scores: ``[..., T]``, finite. Of others the result is tokens, but any.
        count: 1 to T.

    Returns:
        int64 ``[..., count]``, ascending. Never synchronises with the host.

    Raises:
        ValueError: ``count`` out of range.
    """
    tokens = scores.shape[-1]
    if not 1 <= count <= tokens:
        raise ValueError(f"count: got {count}; allowed: 1 to {tokens} tokens.")
    # topk alone does not say which of equal scores it takes: it only finds the lowest
    # score that stays. The rest is counting, which keeps shapes fixed.
    lowest = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > lowest
    equal = scores == lowest
    places = count - above.sum(dim=-1, keepdim=True)
    from_end = equal.flip(-1).cumsum(dim=-1).flip(-1)
    stays = above | (equal & (from_end <= places))
    # The i-th token that stays goes to slot i; the others all to a slot cut off.
    slot = torch.where(stays, stays.cumsum(dim=-1) - 1, count)
    position = torch.arange(tokens, device=scores.device).expand_as(slot)
    # Not empty: with NaN among the scores fewer stay, and every slot must be a token.
    kept = torch.zeros(
        *scores.shape[:-1], count + 1, dtype=torch.int64, device=scores.device
    )
    return kept.scatter_(-1, slot, position)[..., :count]


def best_and_tail(scores: Tensor, count: int, tail: int) -> Tensor:
    """The best tokens by score, then the last ones, which have none.

    Args:
        scores: ``[..., M - tail]``: a layer's, or each KV head's.
        count: Tokens to select, the tail included; above ``tail``.
        tail: Last tokens, always selected.

    Returns:
        int64 ``[..., count]``, ascending tokens in 0 to M - 1.

    Raises:
        ValueError: ``count`` is not in tail + 1 to M.
    """
    prefix = scores.shape[-1]
    if not tail < count <= prefix + tail:
        raise ValueError(
            f"count: got {count}; allowed: {tail + 1} to {prefix + tail} tokens "
            f"({tail} always stay)."
        )
    best = top_tokens(scores, count - tail)
    last = torch.arange(prefix, prefix + tail, device=scores.device)
    return torch.cat([best, last.expand(*scores.shape[:-1], tail)], dim=-1)
