"""The check of the block manager's whole state finds each kind of fault."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager

from asl_vllm.engine.scheduler.integrity import IntegrityError, check_integrity
from asl_vllm_testing.block_manager import BLOCK, manager, pruned_blocks, request
from asl_vllm_testing.scheduler_host import BLOCK as SCHEDULER_BLOCK
from asl_vllm_testing.scheduler_host import Host, make_host

POOL = 20


@pytest.fixture
def host() -> KVCacheManager:
    """A pool with one pruned request, two that share a prefix, and free blocks."""
    host = manager(blocks=POOL)
    pruned = request("pruned", 10 * BLOCK, hashed=False)
    pruned_blocks(host).set_pruned_blocks("pruned", 7)
    assert host.allocate_slots(
        pruned, 0, num_external_computed_tokens=pruned.num_tokens - 1
    )
    for name in ("first", "second"):
        plain = request(name, 4 * BLOCK + 3)
        blocks, cached = host.get_computed_blocks(plain)[:2]
        assert cached == (0 if name == "first" else 4 * BLOCK)
        assert host.allocate_slots(
            plain,
            plain.num_tokens - cached,
            num_new_computed_tokens=cached,
            new_computed_blocks=blocks,
        )
    check_integrity(host)
    return host


def row(host: KVCacheManager, name: str) -> list[Any]:
    return pruned_blocks(host).req_to_blocks[name]


def faults(host: KVCacheManager, **kw: Any) -> str:
    with pytest.raises(IntegrityError) as raised:
        check_integrity(host, **kw)
    assert raised.value.faults
    return str(raised.value)


def test_an_empty_pool_is_whole() -> None:
    check_integrity(manager(blocks=POOL), idle=True)


@pytest.mark.parametrize("order", ["psf", "fsp", "spf"])
def test_idle_once_all_are_freed(host: KVCacheManager, order: str) -> None:
    names = {"p": "pruned", "s": "second", "f": "first"}
    for letter in order:
        host.free(request(names[letter], 1))
        check_integrity(host)
    assert "pruned blocks of pruned are remembered" in faults(host, idle=True)
    pruned_blocks(host).forget("pruned")
    check_integrity(host, idle=True)


def lose(host: KVCacheManager) -> None:
    row(host, "pruned").pop().ref_cnt = 0


def count_too_many(host: KVCacheManager) -> None:
    row(host, "first")[-1].ref_cnt += 1


def free_while_owned(host: KVCacheManager) -> None:
    block = row(host, "pruned")[-1]
    host.block_pool.free_block_queue.append(block)


def free_twice(host: KVCacheManager) -> None:
    queue = host.block_pool.free_block_queue
    block = row(host, "first").pop()
    host.block_pool.free_blocks([block])
    first = queue.fake_free_list_head.next_free_block
    assert first is not None
    # A second way in: the list passes the block again and so loops.
    block.next_free_block = first


def give_to_another(host: KVCacheManager) -> None:
    row(host, "second")[-1] = row(host, "pruned")[-1]


def twin(host: KVCacheManager) -> None:
    """A second request, pruned alike, that shares all blocks but the last."""
    pruned_blocks(host).set_pruned_blocks("twin", 7)
    like = request("twin", 10 * BLOCK, hashed=False)
    pruned_blocks(host).offer_twin("twin", "pruned", 10 * BLOCK - 1)
    assert host.allocate_slots(like, 1, num_external_computed_tokens=10 * BLOCK - 1)
    _, retained = host.take_kv_cache_block_copies()
    host.block_pool.free_blocks(retained)
    assert row(host, "twin")[7:9] == row(host, "pruned")[7:9]
    check_integrity(host)


def share_out_of_place(host: KVCacheManager) -> None:
    twin(host)
    blocks = row(host, "twin")
    blocks[7], blocks[8] = blocks[8], blocks[7]


def share_a_pruned_block(host: KVCacheManager) -> None:
    give_to_another(host)
    row(host, "pruned")[-1].ref_cnt += 1


def hold_twice(host: KVCacheManager) -> None:
    blocks = row(host, "first")
    blocks.append(blocks[-1])
    blocks[-1].ref_cnt += 1


def lack_a_block(host: KVCacheManager) -> None:
    row(host, "first")[0] = host.block_pool.null_block


def prune_less(host: KVCacheManager) -> None:
    pruned_blocks(host).set_pruned_blocks("pruned", 6)


def hash_a_pruned_block(host: KVCacheManager) -> None:
    pool = host.block_pool
    block_hash = row(host, "first")[0].block_hash
    block = row(host, "pruned")[-1]
    block.set_block_hash(block_hash)
    pool.cached_block_hash_to_block.insert(block_hash, block)


def forget_a_hash(host: KVCacheManager) -> None:
    row(host, "first")[1].reset_hash()


def drop_from_the_map(host: KVCacheManager) -> None:
    block = row(host, "first")[1]
    host.block_pool.cached_block_hash_to_block.pop(block.block_hash, block.block_id)


def free_the_null_block(host: KVCacheManager) -> None:
    host.block_pool.free_block_queue.append(host.block_pool.null_block)


def miscount_the_free(host: KVCacheManager) -> None:
    host.block_pool.free_block_queue.num_free_blocks -= 1


def second_null_block(host: KVCacheManager) -> None:
    row(host, "pruned")[-1].is_null = True


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lose, "is lost: neither free nor owned"),
        (lose, "used + 1 null blocks are 19, the pool has 20"),
        (count_too_many, "counts 2 owners and has 1: first"),
        (free_while_owned, "is free and owned by pruned"),
        (free_twice, "the free list loops"),
        (share_a_pruned_block, "of the pruned request pruned is shared"),
        (share_out_of_place, "shared with one that is not pruned alike"),
        (give_to_another, "counts 1 owners and has 2: pruned, second"),
        (hold_twice, "the row of first has block"),
        (lack_a_block, "the row of first has null blocks at [0], its first 0 are"),
        (prune_less, "null blocks at [0, 1, 2, 3, 4, 5, 6], its first 6 are pruned"),
        (hash_a_pruned_block, "of the pruned request pruned is in the prefix cache"),
        (forget_a_hash, "which has another hash or none"),
        (drop_from_the_map, "has a hash that the prefix cache lacks"),
        (free_the_null_block, "the null block is in the free list"),
        (miscount_the_free, "blocks and counts"),
        (second_null_block, "instead of block 0 alone"),
    ],
)
def test_each_fault_is_named(
    host: KVCacheManager, corrupt: Callable[[KVCacheManager], None], message: str
) -> None:
    corrupt(host)
    assert message in faults(host)


def test_a_long_list_of_faults_is_cut() -> None:
    host = manager(blocks=30)
    for block in host.block_pool.blocks[1:25]:
        block.ref_cnt += 1
    message = faults(host)
    assert message.count("counts 1 owners") == 20
    assert message.endswith("and 4 more")


class TestInAScheduler:
    """``check_integrity`` of the configuration, run by the connector."""

    @staticmethod
    def run(host: Host) -> None:
        """One pruned request, from arrival to its last token."""
        host.add("a")
        host.step()
        host.step(done={"a"})
        for _ in range(4):
            host.step()
        assert not host.scheduler.requests

    def test_runs_once_at_each_idle(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="asl_vllm.engine.scheduler.integrity")
        host = make_host(check_integrity=True)
        for times in (1, 2):
            self.run(host)
            for _ in range(3):
                host.step()
            assert caplog.text.count("the KV pool is whole") == times

    def test_a_lost_block_ends_the_engine(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        host = make_host(check_integrity=True)
        self.run(host)
        host.scheduler.kv_cache_manager.block_pool.get_new_blocks(1)
        with pytest.raises(IntegrityError, match="is lost"):
            host.step()
        assert re.search(r"KV pool at idle: block \d+ is lost", caplog.text)

    def test_not_while_requests_are_left(self) -> None:
        host = make_host(check_integrity=True)
        self.run(host)
        host.add("b", budget=None, tokens=SCHEDULER_BLOCK)
        host.scheduler.kv_cache_manager.block_pool.get_new_blocks(1)
        for _ in range(4):
            host.step()
        with pytest.raises(IntegrityError, match="is lost"):
            host.step()

    def test_off_by_default(self) -> None:
        host = make_host()
        self.run(host)
        host.scheduler.kv_cache_manager.block_pool.get_new_blocks(1)
        host.step()
