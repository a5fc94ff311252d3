"""The block-table view against a loop over rows, into poisoned buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asl_kernels.block_table_view import block_table_view, leading_null_blocks

POISON = -77


def table(rows: list[list[int]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)


def view(
    block_table: Tensor, seq_lens: list[int], block_size: int
) -> tuple[list[list[int]], list[int]]:
    out_table = torch.full_like(block_table, POISON)
    out_lens = torch.full((len(seq_lens),), POISON, dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    block_table_view(
        block_table, lens, block_size, out_table=out_table, out_lens=out_lens
    )
    return out_table.tolist(), out_lens.tolist()


def naive_row(row: list[int], length: int, block_size: int) -> tuple[list[int], int]:
    lead = 0
    while lead < len(row) and row[lead] == 0:
        lead += 1
    if lead == len(row):
        lead = 0
    return row[lead:] + [0] * lead, max(0, length - lead * block_size)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), columns=st.integers(0, 9), block_size=st.sampled_from([1, 16]))
def test_matches_naive(data: st.DataObject, columns: int, block_size: int) -> None:
    block = st.one_of(st.just(0), st.integers(0, 5))
    line = st.lists(block, min_size=columns, max_size=columns)
    rows = data.draw(st.lists(line, max_size=5))
    count = len(rows)
    lens = data.draw(st.lists(st.integers(0, 200), min_size=count, max_size=count))
    got_table, got_lens = view(table(rows, columns), lens, block_size)
    want = [naive_row(r, n, block_size) for r, n in zip(rows, lens, strict=True)]
    assert got_table == [row for row, _ in want]
    assert got_lens == [length for _, length in want]


def test_examples() -> None:
    rows = [
        [0, 0, 7, 8, 0],  # pruned: two blocks gone, one not yet allocated
        [3, 4, 5, 6, 9],  # full
        [3, 0, 5, 0, 0],  # a null block inside stays
        [0, 0, 0, 0, 0],  # padding
        [0, 0, 0, 0, 2],
    ]
    got_table, got_lens = view(table(rows, 5), [60, 80, 35, 0, 79], 16)
    assert got_table == [
        [7, 8, 0, 0, 0],
        [3, 4, 5, 6, 9],
        [3, 0, 5, 0, 0],
        [0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0],
    ]
    assert got_lens == [28, 80, 35, 0, 15]
    lead = leading_null_blocks(table(rows, 5))
    assert lead.dtype == torch.int64
    assert lead.tolist() == [2, 0, 0, 0, 4]


def test_lengths_of_padding_rows_pass_through() -> None:
    assert view(table([[0, 0]], 2), [5], 16) == ([[0, 0]], [5])


def test_lengths_never_go_below_zero() -> None:
    assert view(table([[0, 0, 1]], 3), [20], 16) == ([[1, 0, 0]], [0])


def test_slices_of_wider_buffers() -> None:
    block_table = torch.full((6, 12), POISON, dtype=torch.int32)
    block_table[:3, :4] = table([[0, 1, 2, 3], [4, 5, 6, 0], [0, 0, 0, 7]], 4)
    out_table = torch.full((6, 12), POISON, dtype=torch.int32)
    out_lens = torch.full((6,), POISON, dtype=torch.int32)
    block_table_view(
        block_table[:3, :4],
        torch.tensor([64, 48, 50], dtype=torch.int32),
        16,
        out_table=out_table[:3, :4],
        out_lens=out_lens[:3],
    )
    assert out_table[:3, :4].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0], [7, 0, 0, 0]]
    assert out_lens.tolist() == [48, 48, 2, POISON, POISON, POISON]
    assert (out_table[3:] == POISON).all()
    assert (out_table[:, 4:] == POISON).all()


def test_sources_are_left_alone() -> None:
    block_table = table([[0, 0, 7]], 3)
    lens = torch.tensor([40], dtype=torch.int32)
    out = torch.empty_like(block_table), torch.empty_like(lens)
    block_table_view(block_table, lens, 16, out_table=out[0], out_lens=out[1])
    assert block_table.tolist() == [[0, 0, 7]]
    assert lens.tolist() == [40]


def test_no_result_is_read_by_the_host() -> None:
    # Meta tensors have no data: reading any, or a shape that depends on it, raises.
    block_table = torch.empty(3, 4, dtype=torch.int32, device="meta")
    lens = torch.empty(3, dtype=torch.int32, device="meta")
    out_table, out_lens = torch.empty_like(block_table), torch.empty_like(lens)
    block_table_view(block_table, lens, 16, out_table=out_table, out_lens=out_lens)


def test_bad_arguments() -> None:
    good = table([[0, 1]], 2)
    lens = torch.ones(1, dtype=torch.int32)
    out = torch.empty_like(good)
    out_lens = torch.empty_like(lens)
    with pytest.raises(ValueError, match=r"block_table: got shape \(2,\); wanted \[R"):
        block_table_view(good[0], lens, 16, out_table=out, out_lens=out_lens)
    with pytest.raises(ValueError, match=r"block_table: got torch\.int64"):
        block_table_view(good.long(), lens, 16, out_table=out, out_lens=out_lens)
    with pytest.raises(ValueError, match=r"seq_lens: got shape \(2,\); wanted \[R\]"):
        block_table_view(good, lens.repeat(2), 16, out_table=out, out_lens=out_lens)
    with pytest.raises(ValueError, match=r"out_table: got shape \(1, 1\); wanted"):
        block_table_view(good, lens, 16, out_table=out[:, :1], out_lens=out_lens)
    with pytest.raises(ValueError, match=r"out_lens: got torch\.int64"):
        block_table_view(good, lens, 16, out_table=out, out_lens=out_lens.long())
    with pytest.raises(ValueError, match=r"out_lens: on meta"):
        block_table_view(good, lens, 16, out_table=out, out_lens=out_lens.to("meta"))
    with pytest.raises(ValueError, match=r"out_table: is its own source"):
        block_table_view(good, lens, 16, out_table=good, out_lens=out_lens)
    with pytest.raises(ValueError, match=r"out_lens: is its own source"):
        block_table_view(good, lens, 16, out_table=out, out_lens=lens)
    with pytest.raises(ValueError, match=r"block_size: got 0"):
        block_table_view(good, lens, 0, out_table=out, out_lens=out_lens)
    with pytest.raises(ValueError, match=r"block_table: got torch\.int64"):
        leading_null_blocks(good.long())
