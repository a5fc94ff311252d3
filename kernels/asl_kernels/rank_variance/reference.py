"""Ranks and their variance in plain torch: the truth that kernels are tested on."""

from __future__ import annotations

import torch
from torch import Tensor


def descending_ranks(scores: Tensor) -> Tensor:
    """See `asl_kernels.rank_variance.descending_ranks`."""
    tokens = scores.shape[0]
    # A stable sort keeps equal scores in order; reversed, the later one comes first.
    order = scores.flip(0).sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, tokens + 1, device=scores.device)
    return ranks.flip(0)


def rank_variance(ranks: Tensor, top: int) -> Tensor:
    """See `asl_kernels.rank_variance.rank_variance`."""
    candidates = (ranks <= top).any(dim=0)
    # fp64: squared ranks of long prompts pass fp32's exact integers. A mask rather
    # than an index keeps shapes fixed, so nothing waits for the device.
    values = ranks.double()
    squares = (values - values.mean(dim=0)).square().mean(dim=0)
    return (squares * candidates).sum() / candidates.sum()
