"""Whether the KV pool's books agree: each block somewhere, and owned as it should be.

Read-only over vLLM's `KVCacheManager`, its block managers and its `BlockPool`. Tests
call `check_integrity` after whatever drives an engine; with the option
``check_integrity`` an engine calls it whenever it falls idle (`IdleCheck`).

Blocks that nothing owns but are not free yet, such as deferred frees of a KV consumer
or copies of partial prefix hits, are reported as lost: the configurations that we
accept have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager, WindowBlocksManager

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager

logger = init_logger(__name__)

_SHOWN = 20
"""Faults that a message lists; one cause often shows in many blocks."""


class IntegrityError(RuntimeError):
    """The pool's books contradict each other; ``faults`` names each contradiction."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        listed = "; ".join(faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        super().__init__(f"the KV pool is inconsistent: {listed}{more}")


def check_integrity(kv_cache_manager: KVCacheManager, *, idle: bool = False) -> None:
    """Raises unless the whole state of the block manager is consistent.

    Every block but the null one is either free, once, or owned by as many requests
    as it counts; free + used + null = all. A request's row begins with as many null
    blocks as it has pruned blocks and has no other; where layers have a sliding window,
    with those that it left behind. A pruned request shares blocks
    with others that are pruned alike only, at the same place of their rows, and none
    of them is in the prefix cache.

    Args:
        kv_cache_manager: The scheduler's. Not while it is in the middle of a call.
        idle: There is no request, so that nothing may be owned or remembered.

    Raises:
        IntegrityError: names every contradiction found.
    """
    faults = list(_faults(kv_cache_manager, idle))
    if faults:
        raise IntegrityError(faults)


class IdleCheck:
    """`check_integrity` once each time the last request has ended.

    It is told of every request; for the scheduler that ``kv_cache_manager`` is of.
    """

    def __init__(self, kv_cache_manager: KVCacheManager) -> None:
        self._kv_cache_manager = kv_cache_manager
        self._live: set[str] = set()
        self._checked = True

    def begin(self, request_id: str) -> None:
        """A request came."""
        self._live.add(request_id)

    def end(self, request_id: str) -> None:
        """A request ended."""
        self._live.discard(request_id)

    def run(self) -> None:
        """Checks if the engine is idle and was not at the last call.

        Raises:
            IntegrityError: the KV pool is not whole. It ends the engine, which serves
                nobody right now: a block with a wrong owner could show one request's
                tokens to another.
        """
        idle = not self._live
        if idle and not self._checked:
            try:
                check_integrity(self._kv_cache_manager, idle=True)
            except IntegrityError as error:
                for fault in error.faults:
                    logger.error("asl_vllm: KV pool at idle: %s", fault)
                raise
            logger.info("asl_vllm: the KV pool is whole")
        self._checked = idle


def _faults(kv_cache_manager: KVCacheManager, idle: bool) -> Iterator[str]:
    pool = kv_cache_manager.block_pool
    managers = kv_cache_manager.coordinator.single_type_managers
    free, broken = _free_blocks(pool)
    yield from broken
    yield from _null_block(pool, free)
    owners: dict[int, list[str]] = {}
    for manager in managers:
        for request_id, row in manager.req_to_blocks.items():
            yield from _row(manager, request_id, row)
            for block in row:
                if not block.is_null:
                    owners.setdefault(block.block_id, []).append(request_id)
        if isinstance(manager, PrunedBlocksManager):
            for request_id, pinned in manager.pins.items():
                for block in pinned:
                    reader = f"the prefill of {request_id}"
                    owners.setdefault(block.block_id, []).append(reader)
    yield from _ownership(pool, free, owners)
    yield from _pruned_are_apart(managers, pool)
    yield from _prefix_cache(pool)
    if idle:
        yield from _nothing_left(managers, owners)


def _free_blocks(pool: BlockPool) -> tuple[Counter[int], list[str]]:
    """How often each block id is in the free list, and what is wrong with the list."""
    queue = pool.free_block_queue
    seen: Counter[int] = Counter()
    block = queue.fake_free_list_head.next_free_block
    # One more than there can be: a list that loops must not hang the check.
    while block is not None and block is not queue.fake_free_list_tail:
        seen[block.block_id] += 1
        if seen.total() > pool.num_gpu_blocks:
            return seen, ["the free list loops"]
        block = block.next_free_block
    faults = []
    if block is None:
        faults.append("the free list does not reach its end")
    if seen.total() != queue.num_free_blocks:
        faults.append(
            f"the free list holds {seen.total()} blocks and counts "
            f"{queue.num_free_blocks}"
        )
    return seen, faults


def _null_block(pool: BlockPool, free: Counter[int]) -> Iterator[str]:
    nulls = [block.block_id for block in pool.blocks if block.is_null]
    if nulls != [0]:
        yield f"the null blocks are {nulls} instead of block 0 alone"
    if free[0]:
        yield "the null block is in the free list"


def _ownership(
    pool: BlockPool, free: Counter[int], owners: dict[int, list[str]]
) -> Iterator[str]:
    for block in pool.blocks:
        if block.is_null:
            continue
        name = f"block {block.block_id}"
        mine = owners.get(block.block_id, [])
        if free[block.block_id] > 1:
            yield f"{name} is in the free list {free[block.block_id]} times"
        if free[block.block_id] and mine:
            yield f"{name} is free and owned by {', '.join(mine)}"
        if not free[block.block_id] and not mine:
            yield f"{name} is lost: neither free nor owned"
        if block.ref_cnt != len(mine):
            yield (
                f"{name} counts {block.ref_cnt} owners and has {len(mine)}: "
                f"{', '.join(mine) or 'none'}"
            )
    used = len(owners)
    total = free.total() + used + 1
    if total != pool.num_gpu_blocks:
        yield (
            f"{free.total()} free + {used} used + 1 null blocks are {total}, the pool "
            f"has {pool.num_gpu_blocks}"
        )


def _row(manager: Any, request_id: str, row: list[Any]) -> Iterator[str]:
    if not row:
        return
    where = f"the row of {request_id}"
    nulls = [column for column, block in enumerate(row) if block.is_null]
    if isinstance(manager, WindowBlocksManager):
        if nulls != list(range(len(nulls))):
            yield f"{where} of a sliding window has null blocks at {nulls}"
        pruned = len(nulls)
    elif isinstance(manager, PrunedBlocksManager):
        late = manager.is_pruned_late(request_id)
        pruned = 0 if late else manager.pruned_blocks(request_id)
    else:
        pruned = 0
    if nulls != list(range(pruned)):
        yield f"{where} has null blocks at {nulls}, its first {pruned} are pruned"
    repeated = Counter(block.block_id for block in row if not block.is_null)
    for block_id, times in repeated.items():
        if times > 1:
            yield f"{where} has block {block_id} {times} times"


def _pruned_are_apart(managers: Any, pool: BlockPool) -> Iterator[str]:
    pruned_of: dict[str, int] = {}
    for manager in managers:
        if isinstance(manager, PrunedBlocksManager):
            for request_id in manager.pruned_requests():
                pruned_of[request_id] = max(
                    manager.pruned_blocks(request_id), pruned_of.get(request_id, 0)
                )
    rows = [
        (
            group,
            request_id,
            manager.pruned_blocks(request_id)
            if isinstance(manager, PrunedBlocksManager)
            else pruned_of.get(request_id, 0),
            row,
        )
        for group, manager in enumerate(managers)
        for request_id, row in manager.req_to_blocks.items()
    ]
    places: dict[int, set[tuple[int, int, int]]] = {}
    for group, _, pruned, row in rows:
        for column, block in enumerate(row):
            places.setdefault(block.block_id, set()).add((group, pruned, column))
    for _, request_id, pruned, row in rows:
        for block in row if pruned else ():
            if block.is_null:
                continue
            name = f"block {block.block_id} of the pruned request {request_id}"
            if len(places[block.block_id]) > 1:
                yield f"{name} is shared with one that is not pruned alike"
            if (
                block.block_hash is not None
                or block.block_id in pool.cached_block_hashes_by_block
            ):
                yield f"{name} is in the prefix cache"


def _prefix_cache(pool: BlockPool) -> Iterator[str]:
    """The map from hashes to blocks, and the blocks' own hashes, both ways."""
    for block_hash, entry in pool.cached_block_hash_to_block._cache.items():
        blocks = entry.values() if isinstance(entry, dict) else [entry]
        for block in blocks:
            others = pool.cached_block_hashes_by_block.get(block.block_id, ())
            if block.block_hash != block_hash and block_hash not in others:
                yield (
                    f"the prefix cache names block {block.block_id}, which has "
                    "another hash or none"
                )
    for block in pool.blocks:
        block_hash = block.block_hash
        if block_hash is not None and not pool.cached_block_hash_to_block.contain(
            block_hash, block.block_id
        ):
            yield f"block {block.block_id} has a hash that the prefix cache lacks"


def _nothing_left(managers: Any, owners: dict[int, list[str]]) -> Iterator[str]:
    for block_id, names in owners.items():
        yield f"block {block_id} is still owned by {', '.join(names)} at idle"
    for manager in managers:
        if isinstance(manager, PrunedBlocksManager):
            for request_id in manager.pruned_requests():
                yield f"pruned blocks of {request_id} are remembered at idle"
