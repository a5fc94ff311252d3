"""The block-table view in plain torch: the truth that kernels are tested on."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_null_blocks(block_table: Tensor) -> Tensor:
    """See `asl_kernels.block_table_view.leading_null_blocks`."""
    rows, columns = block_table.shape
    if columns == 0:
        return torch.zeros(rows, dtype=torch.int64, device=block_table.device)
    column = torch.arange(columns, device=block_table.device)
    lead = torch.where(block_table != 0, column, columns).amin(dim=1)
    return lead.masked_fill_(lead == columns, 0)


def block_table_view(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_lens: Tensor,
) -> None:
    """See `asl_kernels.block_table_view.block_table_view`."""
    columns = block_table.shape[1]
    lead = leading_null_blocks(block_table)
    source = torch.arange(columns, device=block_table.device) + lead.unsqueeze(1)
    shifted = block_table.gather(1, source.clamp(max=columns - 1))
    out_table.copy_(shifted.masked_fill_(source >= columns, 0))
    out_lens.copy_((seq_lens - lead * block_size).clamp_(min=0))
