"""What a step's views of block tables touch, and the memory that they take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from asl_vllm.engine.worker import attention
from asl_vllm.engine.worker.attention import ViewMixin

BLOCK_SIZE, ROWS, COLUMNS, MOST_ROWS = 16, 4, 8192, 64


class Stock:
    """A backend's builder that gives back what it is given."""

    def build(self, prefix: int, common: Any, fast_build: bool = False) -> Any:
        return common


class Builder(ViewMixin, Stock):
    def __init__(self) -> None:
        self.kv_cache_spec: Any = SimpleNamespace(block_size=BLOCK_SIZE)
        self.vllm_config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=MOST_ROWS),
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
        )


def batch(longest: int) -> CommonAttentionMetadata:
    """A pruned row of ``longest`` tokens among others."""
    table = torch.ones(ROWS, COLUMNS, dtype=torch.int32)
    table[0, :2] = 0
    starts = torch.arange(ROWS + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([longest, 40, 40, 40], dtype=torch.int32),
        num_reqs=ROWS,
        num_actual_tokens=ROWS,
        max_query_len=1,
        max_seq_len=longest,
        block_table_tensor=table,
        slot_mapping=torch.zeros(ROWS, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("longest", "columns"),
    [(100, 7), (112, 7), (113, 8), (BLOCK_SIZE * COLUMNS, COLUMNS)],
)
def test_no_column_behind_the_longest_row_is_touched(
    longest: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    shift = attention.block_table_view

    def note(table: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(table.shape)
        assert kwargs["out_table"].shape == table.shape
        shift(table, *args, **kwargs)

    monkeypatch.setattr(attention, "block_table_view", note)
    built = Builder().build(0, batch(longest))
    assert seen == [(ROWS, columns)]
    assert built.seq_lens.tolist() == [longest - 2 * BLOCK_SIZE, 40, 40, 40]
    assert built.block_table_tensor[0, : columns - 2].tolist() == [1] * (columns - 2)


def test_the_bytes_of_a_builders_buffers() -> None:
    """One table and one row of lengths for each band, made once."""
    builder = Builder()
    builder.build(0, batch(100))
    tables, lengths = builder._tables, builder._lengths
    assert tables is not None and lengths is not None
    assert tables.nbytes + lengths.nbytes == 4 * MOST_ROWS * (COLUMNS + 1)
    builder.build(0, batch(500))
    assert builder._tables is tables
