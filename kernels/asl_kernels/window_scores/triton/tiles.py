"""Block sizes of the window-score kernels, and how they split the keys."""

from __future__ import annotations

import torch
import triton

AVERAGE_BLOCK = 256
COMBINE_SPLITS = 64
COMBINE_ROWS = 16
# Programs at work on one multiprocessor at a time; what a pass splits the keys into.
_PROGRAMS_PER_PROCESSOR = 2


def block_sizes(
    window: int, group: int, dim: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and Triton's launch options, for one shape.

    They bound a program's shared memory by 96 KiB, so that two programs run on a
    multiprocessor of an H100 at a time, and one on a consumer GPU's.
    """
    block_dim = max(16, triton.next_power_of_2(dim))
    least_rows, largest_rows, warps, stages = 16, 64, 4, 2
    if dtype == torch.float32:
        # Without tensor cores the operands lie in registers: few columns at a time,
        # and one tile for all shapes, which spills none.
        block_dim, least_rows, warps = 16, 64, 8
    elif block_dim > 256:
        block_dim = 64
    elif block_dim <= 128:
        # Two blocks of keys under way.
        largest_rows, stages = 128, 3
    rows = max(least_rows, triton.next_power_of_2(window * group))
    blocks = {
        "BLOCK_DIM": block_dim,
        "BLOCK_ROWS": min(largest_rows, rows),
        "BLOCK_KEYS": 64,
    }
    return blocks, {"num_warps": warps, "num_stages": stages}


def split_tokens(total: int, splits: int, block: int) -> int:
    """Keys of a split, whole blocks, where ``total`` keys make about ``splits``."""
    return int(triton.cdiv(triton.cdiv(total, max(1, splits)), block) * block)


def programs_of(device: torch.device) -> int:
    """How many programs keep the device busy."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(processors) * _PROGRAMS_PER_PROCESSOR
