"""Positions of rows that have gaps between them."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(tokens: int, count: int) -> Tensor:
    """int64 ``[count]``, ascending, below ``tokens``, the last token among them."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randperm(tokens - 1, generator=generator)[: count - 1]
    return torch.cat([chosen.sort().values, torch.tensor([tokens - 1])])
