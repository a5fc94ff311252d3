"""The gathers in plain torch: the truth that kernels are tested on."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(rows: Tensor, kept: Tensor) -> Tensor:
    """Row i of head h is ``rows[kept[h, i], h]``; contiguous ``[K, Hkv, D]``."""
    heads = torch.arange(rows.shape[1], device=rows.device)
    return rows[kept.t(), heads].contiguous()


def gather_tokens(hidden: Tensor, kept: Tensor) -> Tensor:
    """See `asl_kernels.gather_kept.gather_tokens`."""
    return hidden.index_select(0, kept)
