"""The tokens that are selected: the highest scoring ones, and the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from asl_vllm.selection.device import on_device


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
    # score that stays.
    lowest = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return _down_to(lowest, scores, count, count)


def _down_to(lowest: Tensor, scores: Tensor, count: Tensor | int, slots: int) -> Tensor:
    """Tokens of the ``count`` scores down to ``lowest``, in the first of the ``slots``.

    By counting, which keeps shapes fixed. ``lowest``, and ``count`` if it is a tensor,
    are ``[..., 1]``; what is in the other slots are tokens, but any.
    """
    above = scores > lowest
    equal = scores == lowest
    places = count - above.sum(dim=-1, keepdim=True)
    from_end = equal.flip(-1).cumsum(dim=-1).flip(-1)
    stays = above | (equal & (from_end <= places))
    # The i-th token that stays goes to slot i; the others all to a slot cut off.
    slot = torch.where(stays, stays.cumsum(dim=-1) - 1, slots)
    position = torch.arange(scores.shape[-1], device=scores.device).expand_as(slot)
    # Not empty: with NaN among the scores fewer stay, and every slot must be a token.
    kept = torch.zeros(
        *scores.shape[:-1], slots + 1, dtype=torch.int64, device=scores.device
    )
    return kept.scatter_(-1, slot, position)[..., :slots]


class BestOfEach:
    """`best_and_tail` of several layers at once, by as many launches as of one.

    Args:
        columns: M - tail of each.
        counts: Tokens to select of each.
        tail: Last tokens, always selected.
        device: The scores'.
    """

    def __init__(
        self,
        columns: Sequence[int],
        counts: Sequence[int],
        tail: int,
        device: torch.device,
    ) -> None:
        for before, count in zip(columns, counts, strict=True):
            assert tail < count <= before + tail
        self._columns, self._counts = list(columns), list(counts)
        self._slots = max(counts)
        column = torch.arange(max(columns) + tail)
        ends = torch.tensor(list(accumulate(columns)))[:, None]
        widths = torch.tensor(self._columns)[:, None]
        first = ends - widths
        scored = column < widths
        # The tail is better than any token, and what is behind it worse.
        fill = torch.where(column < widths + tail, torch.inf, -torch.inf)
        self._at = on_device((first + column).clamp(max=int(ends[-1]) - 1), device)
        self._scored, self._fill = on_device(scored, device), on_device(fill, device)
        self._count = on_device(torch.tensor(self._counts)[:, None], device)

    def __call__(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Tokens int64 ``[Hkv, count]`` of each, of scores fp32 ``[Hkv, M - tail]``."""
        packed = torch.cat(list(scores), dim=1)
        layers = torch.where(self._scored, packed[:, self._at], self._fill)
        best = layers.topk(self._slots, dim=-1).values
        lowest = best.gather(-1, (self._count - 1).expand(*best.shape[:-1], 1))
        kept = _down_to(lowest, layers, self._count, self._slots)
        return [kept[:, i, :count] for i, count in enumerate(self._counts)]


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
