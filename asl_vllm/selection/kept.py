"""The tokens that stay: the highest scoring ones, and the window."""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores; of equal ones the later are taken.

    Args:
        scores: ``[..., T]``, finite.
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
    kept = torch.empty(
        *scores.shape[:-1], count + 1, dtype=torch.int64, device=scores.device
    )
    return kept.scatter_(-1, slot, position)[..., :count]


def kept_per_head(head_scores: Tensor, kept: int, window: int) -> Tensor:
    """The tokens each KV head keeps: its best by head score, then the window.

    Args:
        head_scores: ``[Hkv, M - W]``.
        kept: k, tokens a head keeps, the window included; above ``window``.
        window: W.

    Returns:
        int64 ``[Hkv, k]``, ascending tokens in 0 to M - 1.

    Raises:
        ValueError: ``kept`` is not in window + 1 to M.
    """
    return _with_window(head_scores, kept, window)


def propagated_tokens(layer_score: Tensor, kept: int, window: int) -> Tensor:
    """The tokens that go deeper: the best by layer score, then the window.

    Args:
        layer_score: ``[M - W]``.
        kept: k, tokens that go deeper, the window included; above ``window``.
        window: W.

    Returns:
        int64 ``[k]``, ascending tokens in 0 to M - 1.

    Raises:
        ValueError: ``kept`` is not in window + 1 to M.
    """
    return _with_window(layer_score, kept, window)


def _with_window(scores: Tensor, kept: int, window: int) -> Tensor:
    prefix = scores.shape[-1]
    if not window < kept <= prefix + window:
        raise ValueError(
            f"kept: got {kept}; allowed: {window + 1} to {prefix + window} tokens "
            f"(window {window})."
        )
    top = top_tokens(scores, kept - window)
    tail = torch.arange(prefix, prefix + window, device=scores.device)
    return torch.cat([top, tail.expand(*scores.shape[:-1], window)], dim=-1)
