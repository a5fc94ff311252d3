"""The block-table view as one Triton kernel, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns that a program handles at a time."""


# Sizes are not specialised on: one compiled kernel serves every batch, and none is
# compiled while requests wait.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["i_columns", "i_block_size", "i_table_row", "i_out_row"]
)
def view_kernel(
    p_table: tl.tensor,
    p_lens: tl.tensor,
    p_out_table: tl.tensor,
    p_out_lens: tl.tensor,
    i_columns: tl.tensor,
    i_block_size: tl.tensor,
    i_table_row: tl.tensor,
    i_table_column: tl.tensor,
    i_lens_row: tl.tensor,
    i_out_row: tl.tensor,
    i_out_column: tl.tensor,
    i_out_lens_row: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Shifts one row left by its leading null blocks and shortens its length.

    Program r takes row r of int32 ``p_table``, ``p_out_table`` [R, ``i_columns``] and
    ``p_lens``, ``p_out_lens`` [R]; ``i_*_row`` and ``i_*_column`` are strides in
    elements.

    Bytes moved, a row: 4 x (C read + C written), 8 for the length, and 4 x the lead
    (rounded up to BLOCK) read once more from the cache. FLOPs: none; C comparisons.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_table + i_row * i_table_row
    p_out = p_out_table + i_row * i_out_row
    b_column = tl.arange(0, BLOCK)

    # Stops at the first block of columns that holds a block id: for a row that is
    # not pruned, at once.
    i_lead = i_columns
    i_start = 0
    while (i_lead == i_columns) & (i_start < i_columns):
        b_at = i_start + b_column
        m_at = b_at < i_columns
        b_id = tl.load(p_row + b_at.to(tl.int64) * i_table_column, mask=m_at, other=0)
        i_lead = tl.min(tl.where(b_id != 0, b_at, i_columns), axis=0)
        i_start += BLOCK
    # Only null blocks: padding, which stays as it is.
    i_lead = tl.where(i_lead == i_columns, 0, i_lead)

    for i_start in range(0, i_columns, BLOCK):
        b_to = i_start + b_column
        b_from = b_to + i_lead
        b_id = tl.load(
            p_row + b_from.to(tl.int64) * i_table_column,
            mask=b_from < i_columns,
            other=0,
        )
        tl.store(p_out + b_to.to(tl.int64) * i_out_column, b_id, mask=b_to < i_columns)

    i_length = tl.load(p_lens + i_row * i_lens_row).to(tl.int64)
    i_length -= i_lead.to(tl.int64) * i_block_size
    p_length = p_out_lens + i_row * i_out_lens_row
    tl.store(p_length, tl.maximum(i_length, 0).to(tl.int32))


def block_table_view(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    out_table: Tensor,
    out_lens: Tensor,
) -> None:
    """See `asl_kernels.block_table_view.block_table_view`.

    Allocates nothing and launches a grid that depends on shapes only, so a CUDA
    graph may capture it.
    """
    rows, columns = block_table.shape
    if rows == 0:
        return
    with torch.accelerator.device_index(block_table.device.index):
        view_kernel[(rows,)](
            block_table,
            seq_lens,
            out_table,
            out_lens,
            columns,
            block_size,
            block_table.stride(0),
            block_table.stride(1),
            seq_lens.stride(0),
            out_table.stride(0),
            out_table.stride(1),
            out_lens.stride(0),
            BLOCK=BLOCK,
            num_warps=4,
        )
