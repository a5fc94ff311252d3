"""Rows are read out of pool blocks as they were written, in any layout of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asl_vllm.engine.worker.pool_rows import PoolRows

BLOCKS, SIZE, HEADS = 6, 16, 3
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
"""vLLM's names of them: layers, blocks, KV heads, tokens of a block, and what is stored
of a token."""


def _pool(layout: str, content: int, dtype: torch.dtype) -> Tensor:
    """One layer's ``[blocks, Hkv, block size, content]``, all NaN."""
    sizes = {"L": 2, "B": BLOCKS, "H": HEADS, "N": SIZE, "C": content}
    memory = torch.full([sizes[name] for name in layout], float("nan"), dtype=dtype)
    return memory.permute([layout.index(name) for name in "LBHNC"])[1]


def _write(page: Tensor, keys: Tensor, values: Tensor) -> None:
    """As vLLM's backends do: a token's keys, its values, and padding."""
    dim, value_dim = keys.shape[2], values.shape[2]
    page[..., :dim] = keys.transpose(0, 1)
    page[..., dim : dim + value_dim] = values.transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dim", "value_dim", "padding"), [(48, 48, 0), (32, 16, 8)])
def test_what_was_written_is_read(
    layout: str, dtype: torch.dtype, dim: int, value_dim: int, padding: int
) -> None:
    pool = _pool(layout, dim + value_dim + padding, dtype)
    generator = torch.Generator().manual_seed(dim)
    keys = torch.randn((BLOCKS * SIZE, HEADS, dim), generator=generator).to(dtype)
    values = torch.randn((BLOCKS * SIZE, HEADS, value_dim), generator=generator)
    values = values.to(dtype)
    for block in range(BLOCKS):
        rows = slice(block * SIZE, (block + 1) * SIZE)
        _write(pool[block], keys[rows], values[rows])
    page = _pool(layout, dim + value_dim + padding, dtype)[0]
    rows_of = PoolRows(
        page,
        (SIZE, HEADS, dim),
        (SIZE, HEADS, value_dim),
        dtype,
        lambda k, v: _write(page, k, v),
    )
    wanted = torch.tensor([4, 0, 5])
    read_keys, read_values = rows_of.rows_of(pool[wanted])
    at = (wanted[:, None] * SIZE + torch.arange(SIZE)).flatten()
    assert torch.equal(read_keys, keys[at])
    assert torch.equal(read_values, values[at])
    given = (
        torch.full_like(read_keys, torch.nan),
        torch.full_like(read_values, torch.nan),
    )
    rows_of.rows_of(pool[wanted], *given)
    assert torch.equal(given[0], keys[at])
    assert torch.equal(given[1], values[at])


def test_a_backend_that_leaves_rows_out_is_found() -> None:
    page = torch.zeros(HEADS, SIZE, 8)

    def half(keys: Tensor, values: Tensor) -> None:
        _write(page[:, : SIZE // 2], keys[: SIZE // 2], values[: SIZE // 2])

    sizes = (SIZE, HEADS, 4)
    with pytest.raises(AssertionError, match="not written"):
        PoolRows(page, sizes, sizes, torch.float32, half)
