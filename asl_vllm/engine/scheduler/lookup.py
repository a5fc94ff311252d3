"""What vLLM's prefix cache holds of a prompt that will be pruned.

vLLM itself must not find it: it would put the blocks into the request's row, where the
prefill writes kept rows, over what others read. So the request's hashes are kept here,
out of its sight. They are chained and hold the salt, so what one tenant may not share
with another is a miss here as there.

Touch points: ``Request.block_hashes``, ``KVCacheCoordinator.find_longest_cache_hit``
and the block pool's ``touch`` and ``free_blocks`` (`asl_vllm.engine.scheduler.blocks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv

from asl_vllm.engine.plan import PrunePlan
from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager
from asl_vllm.engine.settings import Settings
from asl_vllm.prefill import PrefillReport

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


class PrefixLookup:
    """Owns the hashes of pruned requests; says what their prefills may read."""

    def __init__(self, settings: Settings, kv_cache_manager: KVCacheManager) -> None:
        self._settings = settings
        self._coordinator = kv_cache_manager.coordinator
        self._pool = kv_cache_manager.block_pool
        self._managers = [
            manager
            for manager in self._coordinator.single_type_managers
            if isinstance(manager, PrunedBlocksManager)
        ]
        self._usable = settings.usable_blocks(self._pool.num_gpu_blocks)
        self._hashes: dict[str, list[Any]] = {}

    def take_hashes(self, request: Request, plan: PrunePlan) -> None:
        """Keeps the request's hashes, if it may read, and clears them for vLLM."""
        if self.may_read(plan):
            self._hashes[request.request_id] = list(request.block_hashes)
        # Without hashes it neither finds nor leaves blocks in the prefix cache.
        request.block_hashes = []
        request._block_hasher = None

    def may_read(self, plan: PrunePlan) -> bool:
        """Whether a request wants what others computed, and this server has it."""
        return plan.reuse in ("read", "fill") and self._settings.reads_prefixes

    def offer(self, request: Request, plan: PrunePlan) -> None:
        """Offers the longest cached prefix to the block managers, be it none."""
        hits = self._longest(request, plan)
        for manager, blocks in zip(self._managers, hits, strict=True):
            manager.offer(request.request_id, blocks)

    def outcome(self, plan: PrunePlan, report: PrefillReport) -> str:
        """What a prefill found, one of `asl_vllm.engine.scheduler.metrics.REUSE`."""
        if not self.may_read(plan):
            return "none"
        if report.filled_tokens:
            return "filled"
        if not report.reused_tokens:
            return "miss"
        most = self._readable_tokens(plan) // self._settings.block_size
        whole = report.reused_tokens == most * self._settings.block_size
        return "hit" if whole else "partial"

    def worth_filling(
        self, request: Request, plan: PrunePlan, held_blocks: int
    ) -> tuple[list[Any], int]:
        """Hashes of all blocks that a request may read, if some are to be computed.

        None where they do not fit into the pool beside the request's own. And the
        blocks that are left of it now: what fills hold, ``held_blocks``, is soon free.
        """
        nothing: tuple[list[Any], int] = [], 0
        size = self._settings.block_size
        hashes = self._hashes.get(request.request_id, [])
        hashes = hashes[: max(0, self._readable_tokens(plan)) // size]
        if not hashes or len(hashes) + self._own_blocks(request, plan) > self._usable:
            return nothing
        found, tokens, _ = self._coordinator.find_longest_cache_hit(
            hashes, len(hashes) * size
        )
        if tokens == len(hashes) * size:
            return nothing
        in_use = sum(block.ref_cnt > 0 for blocks in found for block in blocks)
        room = self._pool.get_num_free_blocks() + held_blocks
        return hashes, room - (len(hashes) * len(found) - in_use)

    def pinned_ids(self, request_id: str) -> list[list[int]]:
        """Ids of the blocks that were pinned for a request, a row for each manager."""
        rows = [manager.pinned(request_id) for manager in self._managers]
        return [[block.block_id for block in row] for row in rows if row]

    def unpin(self, request_id: str) -> None:
        """The request's prefill reads no more; idempotent."""
        for manager in self._managers:
            manager.unpin(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._hashes.pop(request_id, None)

    @property
    def num_pinned(self) -> int:
        """Blocks that prefills read, each counted once."""
        return len(
            {
                block.block_id
                for manager in self._managers
                for blocks in manager.pins.values()
                for block in blocks
            }
        )

    def _readable_tokens(self, plan: PrunePlan) -> int:
        """Leading tokens that may be read; the window's queries are computed."""
        return plan.num_prompt_tokens - self._settings.config.window

    def _own_blocks(self, request: Request, plan: PrunePlan) -> int:
        """Blocks a manager that its row takes while it is prefilled."""
        return cdiv(request.num_tokens, self._settings.block_size) - plan.absent_blocks

    def _longest(self, request: Request, plan: PrunePlan) -> list[list[Any]]:
        """Of each manager. Free of effects, since the request may have to wait."""
        nothing: list[list[Any]] = [[] for _ in self._managers]
        hashes = self._hashes.get(request.request_id)
        if not hashes:
            return nothing
        size = self._settings.block_size
        own = self._own_blocks(request, plan)
        # In an empty pool the hit fits beside the request's own blocks, or it would
        # wait for ever.
        longest = min(self._readable_tokens(plan), (self._usable - own) * size)
        if longest < size:
            return nothing
        found, tokens, _ = self._coordinator.find_longest_cache_hit(hashes, longest)
        hits = [list(blocks[: tokens // size]) for blocks in found]
        # Nor is it to wait where it could start with less.
        spare = self._pool.get_num_free_blocks() - own * len(hits)
        if spare >= 0:
            while hits[0] and _evictable(hits) > spare:
                hits = [blocks[:-1] for blocks in hits]
        return hits


def _evictable(hits: list[list[Any]]) -> int:
    return sum(block.ref_cnt == 0 for blocks in hits for block in blocks)
