"""A chunk's metadata: made once, of what is on the device already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asl_vllm.engine.worker import chunks
from asl_vllm.engine.worker.chunks import ChunkMetadata

CAPACITY, CHUNK = 100, 16
PAGE = 16
SCRATCH: Any = SimpleNamespace(
    slots=torch.arange(CAPACITY),
    block_table=torch.arange(7, dtype=torch.int32)[None],
    spec=SimpleNamespace(block_size=PAGE),
)


class Builder:
    """Gives back what it is given, and counts."""

    max_num_splits = 32

    def __init__(self) -> None:
        self.built = 0

    def build(self, common_prefix_len: int, common: Any, fast_build: bool) -> Any:
        assert (common_prefix_len, fast_build) == (0, True)
        self.built += 1
        return common


def made() -> tuple[ChunkMetadata, Builder]:
    builder = Builder()
    return ChunkMetadata(builder, SCRATCH, CHUNK), builder


def test_every_chunk_is_described() -> None:
    metadata, _ = made()
    for start in range(0, CAPACITY, 7):
        for end in range(start + 1, min(start + CHUNK, CAPACITY) + 1):
            found = metadata.of(start, end)
            assert found.query_start_loc.tolist() == [0, end - start]
            assert found.query_start_loc_cpu.tolist() == [0, end - start]
            assert found.seq_lens.tolist() == [end]
            assert found.seq_lens_cpu_upper_bound.tolist() == [end]
            assert found.slot_mapping.tolist() == list(range(start, end))
            assert (found.max_query_len, found.max_seq_len) == (end - start, end)
            # Kernels are compiled for addresses; another kind would compile another.
            for tensor in (found.query_start_loc, found.seq_lens):
                assert tensor.is_contiguous()
                assert tensor.data_ptr() % 16 == 0


def test_layers_share_what_is_built_once() -> None:
    metadata, builder = made()
    first = metadata.of(0, 16)
    for _ in range(32):
        assert metadata.of(0, 16) is first
        metadata.of(16, 20)
    assert builder.built == 2


def test_nothing_goes_to_the_device_for_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata, _ = made()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a transfer")

    for name in ("to", "cuda", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    metadata.of(0, 16)


@pytest.mark.parametrize("lengths", [(16, 17, 1), (5,), (1, 2, 3, 4, 5, 6, 7)])
def test_sequences_lie_in_pages_of_their_own(lengths: tuple[int, ...]) -> None:
    metadata, builder = made()
    found = metadata.of_several(list(lengths))
    starts = found.query_start_loc.tolist()
    assert starts == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert found.query_start_loc_cpu.tolist() == starts
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist()
    assert found.seq_lens.tolist() == list(lengths)
    assert (found.num_reqs, found.num_actual_tokens) == (len(lengths), sum(lengths))
    assert found.max_query_len == found.max_seq_len == max(lengths)
    slots = found.slot_mapping.tolist()
    assert found.slot_mapping.dtype == SCRATCH.slots.dtype
    pages: list[int] = []
    for number, length in enumerate(lengths):
        own = slots[starts[number] : starts[number + 1]]
        table = found.block_table_tensor[number].tolist()
        # A row's slots are where its table says that its tokens are.
        assert own == [table[i // PAGE] * PAGE + i % PAGE for i in range(length)]
        pages += table[: -(-length // PAGE)]
    assert len(set(pages)) == len(pages)
    assert max(pages) < 7
    assert metadata.of_several(lengths) is found
    assert builder.built == 1


def test_sequences_lie_behind_what_was_loaded_of_them() -> None:
    metadata, builder = made()
    loaded, lengths = [20, 0, 16], [5, 7, 16]
    found = metadata.of_several(lengths, loaded)
    assert found.query_start_loc.tolist() == [0, 5, 12, 28]
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist()
    assert found.seq_lens.tolist() == [25, 7, 32]
    assert (found.max_query_len, found.max_seq_len) == (16, 32)
    before = metadata.slots_before(loaded, lengths).split(loaded)
    own = found.slot_mapping.split(lengths)
    for table, early, late in zip(found.block_table_tensor, before, own, strict=True):
        slots = torch.cat([early, late])
        at = torch.arange(len(slots))
        assert slots.tolist() == (table[at // PAGE] * PAGE + at % PAGE).tolist()
    every = torch.cat([*before, *own]).tolist()
    assert len(set(every)) == len(every)
    assert metadata.slots_before([20], [5]).tolist() == list(range(20))
    # Whether something was loaded tells two packs of the same lengths apart.
    assert metadata.of_several(lengths).seq_lens.tolist() == lengths
    assert metadata.of_several(lengths, loaded).seq_lens.tolist() == [25, 7, 32]
    assert builder.built == 3


def test_sequences_without_room_are_refused() -> None:
    with pytest.raises(AssertionError, match="no room"):
        made()[0].of_several([1] * 8)


def test_few_chunks_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_MOST", 3)
    metadata, builder = made()
    for end in (1, 2, 3, 4, 1):
        metadata.of(0, end)
    assert builder.built == 5
    assert len(metadata._made) == 2


def test_flash_attention_splits_no_keys() -> None:
    _, builder = made()
    assert builder.max_num_splits == 0
    ChunkMetadata(SimpleNamespace(), SCRATCH, CHUNK)  # others have no such thing
