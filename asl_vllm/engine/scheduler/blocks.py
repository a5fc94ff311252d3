"""The block managers of pruned requests: leading blocks lacking, and windows.

Touch points: a subclass of `FullAttentionManager` that answers
`get_num_skipped_tokens` per request, as a sliding window would; the block table stays
the only source of truth. And one of `SlidingWindowManager`, which holds of every
request what vLLM's own does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request


class PrunedBlocksManager(FullAttentionManager):
    """Full-attention blocks, less the leading ones of pruned requests.

    Owns the number of pruned blocks of each request, and the pins: cached blocks that
    a request's prefill reads, which belong to its row no more than to any other's.
    They never enter the row, where the prefill writes: their hashes promise what they
    hold to every other request. Requests with the same pruned prompt may share its
    whole blocks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pruned_blocks: dict[str, int] = {}
        self._current: str | None = None
        self._late: set[str] = set()
        self._offers: dict[str, list[KVCacheBlock]] = {}
        self._pins: dict[str, list[KVCacheBlock]] = {}
        self._twins: dict[str, tuple[str, int]] = {}

    def offer(self, request_id: str, blocks: Sequence[KVCacheBlock]) -> None:
        """Cached blocks to be pinned if the request is given blocks now."""
        self._offers[request_id] = list(blocks)

    def offer_twin(self, request_id: str, twin: str, num_tokens: int) -> None:
        """If given blocks now, the request shares the twin's of its first tokens.

        Those behind its pruned blocks, and the last as a copy unless it is whole.
        """
        assert self.pruned_blocks(request_id) == self.pruned_blocks(twin)
        self._twins[request_id] = twin, num_tokens

    def withdraw(self, request_id: str) -> None:
        """Drops what was offered for blocks that were not given; idempotent.

        To be said before each attempt: what was offered may belong to others by now.
        """
        self._offers.pop(request_id, None)
        self._twins.pop(request_id, None)

    def pinned(self, request_id: str) -> Sequence[KVCacheBlock]:
        """The blocks that the request's prefill reads."""
        return self._pins.get(request_id, ())

    @property
    def pins(self) -> Mapping[str, Sequence[KVCacheBlock]]:
        """Pinned blocks by request."""
        return self._pins

    def unpin(self, request_id: str) -> None:
        """The prefill reads no more; idempotent. The blocks are freshly used."""
        if blocks := self._pins.pop(request_id, None):
            # Evicted from the tail of the prefix on, as vLLM frees rows.
            self.block_pool.free_blocks(reversed(blocks))

    def set_pruned_blocks(self, request_id: str, num_blocks: int) -> None:
        """Makes the first ``num_blocks`` of a request null blocks.

        Blocks that it holds there are freed when vLLM next schedules it. 0 keeps them
        all; the request stays out of the prefix cache none the less.
        """
        assert num_blocks >= 0
        pruned = self.req_to_blocks.get(request_id, [])[:num_blocks]
        if any(not block.is_null for block in pruned):
            self._late.add(request_id)
        self._pruned_blocks[request_id] = num_blocks

    def forget(self, request_id: str) -> None:
        """Drops what `set_pruned_blocks` said; the request has ended."""
        self._pruned_blocks.pop(request_id, None)
        self.withdraw(request_id)
        assert request_id not in self._pins
        self._late.discard(request_id)

    def pruned_blocks(self, request_id: str) -> int:
        """Leading blocks of a request that are null blocks; 0 if unknown."""
        return self._pruned_blocks.get(request_id, 0)

    def is_pruned_late(self, request_id: str) -> bool:
        """Whether blocks that it took are yet to be freed, when next scheduled."""
        return request_id in self._late

    def pruned_requests(self) -> tuple[str, ...]:
        """Requests of which `set_pruned_blocks` was told and `forget` was not."""
        return tuple(self._pruned_blocks)

    @contextmanager
    def _for(self, request_id: str) -> Iterator[None]:
        self._current = request_id
        try:
            yield
        finally:
            self._current = None

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        if self._current is None:
            return 0
        pruned = self._pruned_blocks.get(self._current, 0) * self.block_size
        return min(pruned, num_computed_tokens)

    def get_num_blocks_to_allocate(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> int:
        # A pin takes a block that nobody holds out of the free ones.
        pinning = self._get_num_evictable_blocks(self._offers.get(request_id, ()))
        with self._for(request_id):
            needed = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        shared, _ = self._shared_with(request_id)
        return int(needed) + pinning - len(shared)

    def add_local_computed_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> None:
        # vLLM calls this for all groups before any takes blocks, which might be these.
        if blocks := self._offers.pop(request_id, None):
            assert request_id not in self._pins
            self.block_pool.touch(blocks)
            self._pins[request_id] = blocks
        with self._for(request_id):
            super().add_local_computed_blocks(request_id, *args, **kwargs)
        shared, copied = self._shared_with(request_id)
        if self._twins.pop(request_id, None):
            row = self.req_to_blocks[request_id]
            row.extend(shared)
            self.block_pool.touch(shared)
            if copied is not None:
                # As where a hit of vLLM's own ends inside a block: it takes a block
                # next, and has workers copy this one before the step's forward.
                assert all(copied is not copy for _, copy in self._pending_cow_copies)
                self._partial_hit_reqs[request_id] = len(row), copied
                row.append(copied)
                self.block_pool.touch([copied])

    def _shared_with(
        self, request_id: str
    ) -> tuple[list[KVCacheBlock], KVCacheBlock | None]:
        """Blocks of a twin that are offered: whole ones, and the one to be copied."""
        if request_id not in self._twins:
            return [], None
        twin, num_tokens = self._twins[request_id]
        row, whole = self.req_to_blocks[twin], num_tokens // self.block_size
        shared = row[self.pruned_blocks(request_id) : whole]
        return shared, row[whole] if num_tokens % self.block_size else None

    def allocate_external_computed_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> None:
        with self._for(request_id):
            super().allocate_external_computed_blocks(request_id, *args, **kwargs)

    def remove_skipped_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        with self._for(request_id):
            super().remove_skipped_blocks(request_id, *args, **kwargs)
        self._late.discard(request_id)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # A pruned block holds other tokens than its positions say.
        if request.request_id not in self._pruned_blocks:
            super().cache_blocks(request, *args, **kwargs)


class WindowBlocksManager(SlidingWindowManager):
    """Blocks of layers with a sliding window, as vLLM keeps them.

    Only a pruned request's stay out of the prefix cache: behind the selection layer
    they hold what a prompt without the dropped tokens has there.
    """

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # The scheduler's half takes a pruned request's hashes away.
        if request.block_hashes:
            super().cache_blocks(request, *args, **kwargs)


def held_blocks(
    manager: PrunedBlocksManager | WindowBlocksManager, request_id: str
) -> int:
    """Blocks that a request owns, null blocks not counted."""
    row = manager.req_to_blocks.get(request_id, ())
    return sum(not block.is_null for block in row)
