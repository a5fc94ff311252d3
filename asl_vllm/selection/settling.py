"""Whether the ranks of a prompt's tokens have settled: the adaptive criterion."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from asl_kernels.rank_variance import descending_ranks, rank_variance


class RankHistory:
    """Ranks of the last ``l_obs`` layers, and their variance against the first's.

    Source: arXiv 2601.07667, section 3.
    """

    def __init__(self, *, l_min: int, l_obs: int, top: int) -> None:
        """``top`` is k - W: the tokens before the window that a layer keeps."""
        self._l_min = l_min
        self._first_ranked = max(0, l_min - l_obs + 1)
        self._top = top
        self._ranks: deque[Tensor] = deque(maxlen=l_obs)
        self._first_variance: float | None = None

    def observe(self, layer: int, layer_score: Tensor) -> Tensor | None:
        """Takes a layer's score ``[T]``; returns its variance fp64 ``[]`` if checked.

        Layers too early to be observed by a check are not ranked at all. A check
        that has seen fewer than ``l_obs`` layers compares those it has.
        """
        if layer < self._first_ranked:
            return None
        self._ranks.append(descending_ranks(layer_score))
        if layer < self._l_min:
            return None
        return rank_variance(torch.stack(tuple(self._ranks)), self._top)

    def ratio(self, variance: float) -> float:
        """Variance relative to that of the first checked layer, which is 1 there.

        Against a first variance of 0 the quotient is undefined: a variance of 0 then
        counts as settled (0.0), any other as not (infinity).
        """
        if self._first_variance is None:
            self._first_variance = variance
            return 1.0
        if self._first_variance == 0.0:
            return 0.0 if variance == 0.0 else math.inf
        return variance / self._first_variance
