"""Attention metadata of a prefill's chunks, made without waiting for the device.

Touch points: `CommonAttentionMetadata` and the backend's own metadata builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata

from asl_vllm.engine.worker.scratch import ScratchPages
from asl_vllm.selection.device import on_device

_MOST = 256
"""Chunks remembered; a prompt of a million tokens has half as many."""
_ALIGNED = 4
"""int32 elements of 16 bytes: kernels are compiled for addresses aligned to these."""


class ChunkMetadata:
    """Metadata of chunks of one sequence whose row r lies in scratch slot r.

    It depends only on where a chunk begins and ends, so it is built once and serves
    all layers and prompts. What the device must know of that lies there from the
    start, as tables of all numbers that occur.

    Args:
        builder: The backend's metadata builder, of no other use.
        scratch: The pages, in the pool's layout.
        chunk_tokens: Tokens of the longest chunk.
    """

    def __init__(self, builder: Any, scratch: ScratchPages, chunk_tokens: int) -> None:
        self._builder = builder
        # Up to 512 tokens FlashAttention would split keys as in a captured graph, which
        # takes hundreds of megabytes and a second kernel.
        if hasattr(builder, "max_num_splits"):
            builder.max_num_splits = 0
        self._scratch = scratch
        capacity, device = len(scratch.slots), scratch.slots.device
        numbers = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._ends = torch.zeros(
            (capacity + 1, _ALIGNED), dtype=torch.int32, device=device
        )
        self._ends[:, 0] = numbers
        most = min(chunk_tokens, capacity)
        self._bounds = torch.zeros(
            (most + 1, _ALIGNED), dtype=torch.int32, device=device
        )
        self._bounds[:, 1] = numbers[: most + 1]
        self._made: dict[tuple[int, int], Any] = {}
        self._packed: tuple[Any, Any] = None, None
        self._before: tuple[Any, torch.Tensor] = None, scratch.slots

    def of(self, start: int, end: int) -> Any:
        """The backend's metadata of rows ``[start, end)``."""
        key = start, end
        found = self._made.get(key)
        if found is None:
            if len(self._made) == _MOST:
                self._made.clear()
            # Fast: no plan of the kernel's work ahead of it, in a buffer that the
            # next one would overwrite.
            common = self._common(start, end)
            found = self._builder.build(0, common, fast_build=True)
            self._made[key] = found
        return found

    def of_several(self, lengths: Sequence[int], loaded: Sequence[int] = ()) -> Any:
        """The backend's metadata of sequences, so many rows of each, one by one.

        Each lies in scratch pages of its own, behind ``loaded`` rows that are there.
        Layers share what is built once.
        """
        key = tuple(lengths), tuple(loaded)
        if self._packed[0] != key:
            before = loaded or [0] * len(lengths)
            common = self._common_of_several(lengths, before)
            self._packed = key, self._builder.build(0, common, fast_build=True)
        return self._packed[1]

    def slots_before(
        self, loaded: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        """Slots of the rows that are to be there before `of_several`'s."""
        if len(loaded) == 1:
            return self._scratch.slots[: loaded[0]]
        key = tuple(loaded), tuple(lengths)
        if self._before[0] != key:
            page = self._scratch.spec.block_size
            pages = [cdiv(a + b, page) for a, b in zip(loaded, lengths, strict=True)]
            places = [
                torch.arange(first * page, first * page + rows)
                for first, rows in zip([0, *accumulate(pages)], loaded, strict=False)
            ]
            slots = self._scratch.slots
            at = on_device(torch.cat(places).to(slots.dtype), slots.device)
            self._before = key, at
        return self._before[1]

    def _common_of_several(
        self, lengths: Sequence[int], loaded: Sequence[int]
    ) -> CommonAttentionMetadata:
        page, slots = self._scratch.spec.block_size, self._scratch.slots
        in_all = [a + b for a, b in zip(loaded, lengths, strict=True)]
        pages = [cdiv(length, page) for length in in_all]
        first = [0, *accumulate(pages)]
        assert first[-1] <= self._scratch.block_table.shape[1], "no room for all"
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        seq_lens = torch.tensor(in_all, dtype=torch.int32)
        # Columns behind a row's pages are not read.
        columns = torch.arange(max(pages), dtype=torch.int32)
        table = torch.tensor(first[:-1], dtype=torch.int32)[:, None] + columns
        places = [
            torch.arange(start * page + before, start * page + length)
            for start, before, length in zip(first, loaded, in_all, strict=False)
        ]
        device = slots.device
        return CommonAttentionMetadata(
            query_start_loc=on_device(ends, device),
            query_start_loc_cpu=ends,
            seq_lens=on_device(seq_lens, device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(lengths),
            num_actual_tokens=int(ends[-1]),
            max_query_len=max(lengths),
            max_seq_len=max(in_all),
            block_table_tensor=on_device(table, device),
            slot_mapping=on_device(torch.cat(places).to(slots.dtype), device),
        )

    def _common(self, start: int, end: int) -> CommonAttentionMetadata:
        n = end - start
        return CommonAttentionMetadata(
            query_start_loc=self._bounds[n, :2],
            query_start_loc_cpu=torch.tensor([0, n], dtype=torch.int32),
            seq_lens=self._ends[end, :1],
            seq_lens_cpu_upper_bound=torch.tensor([end], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=n,
            max_query_len=n,
            max_seq_len=end,
            block_table_tensor=self._scratch.block_table,
            slot_mapping=self._scratch.slots[start:end],
        )
