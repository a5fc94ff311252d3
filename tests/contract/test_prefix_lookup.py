"""vLLM's scheduler with a pruned prompt that reads the prefix cache: pins and room."""

from __future__ import annotations

import pytest
from vllm.v1.request import RequestStatus

from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm.prefill import PrefillJob
from asl_vllm_testing.scheduler_host import (
    BLOCK,
    FREED,
    FULL,
    PROMPT,
    Host,
    make_host,
    report_of,
    state_of,
)

HIT = (PROMPT - 8) // BLOCK
"""Blocks before the window."""
KEPT_BLOCKS = FULL - FREED


@pytest.fixture
def host() -> Host:
    return make_host(reuse="read")


def _donate(host: Host, salt: str | None = None) -> None:
    """An unpruned prompt comes, is answered and leaves its blocks to the cache."""
    host.add("donor", budget=None, max_tokens=2, salt=salt)
    for _ in range(5):
        host.step()
    assert not host.scheduler.requests


def _job(host: Host) -> PrefillJob:
    _, orders = host.step()
    (job,) = orders.jobs
    return job


def _finish(host: Host, name: str = "a") -> None:
    host.step(done={name})
    for _ in range(6):
        host.step()
    assert not host.scheduler.requests
    check_integrity(host.scheduler.kv_cache_manager, idle=True)


def test_several_hits_start_in_one_step(host: Host) -> None:
    """What they read is not computed, so more of them fill a step."""
    _donate(host)
    for tokens in range(4):
        host.add(f"{tokens}", tokens=PROMPT + tokens)
    _, orders = host.step()
    assert [job.reused_tokens >= HIT * BLOCK for job in orders.jobs] == [True] * 4
    host.step(done={job.request_id for job in orders.jobs})
    for _ in range(6):
        host.step()
    check_integrity(host.scheduler.kv_cache_manager, idle=True)
    # Without a prefix two fill the steps ahead.
    host.add("other", tokens=PROMPT, salt="a")
    for tokens in range(1, 4):
        host.add(f"other{tokens}", tokens=PROMPT + tokens, salt="a")
    _, orders = host.step()
    assert len(orders.jobs) == 2


def test_what_is_read_is_pinned_and_never_in_the_row(host: Host) -> None:
    """In the row the prefill would write over what others read."""
    _donate(host)
    before, pool = host.free, host.scheduler.kv_cache_manager.block_pool
    host.add("a")
    job = _job(host)
    (read,) = job.reused_block_ids
    (row,) = host.scheduler.kv_cache_manager.get_block_ids("a")
    assert len(read) == HIT
    assert not set(read) & set(row)
    assert all(pool.blocks[block].block_hash is not None for block in read)
    assert host.free == before - HIT - KEPT_BLOCKS
    assert state_of(host)["pool"]["blocks_pinned"] == HIT
    assert state_of(host)["requests"][0]["reused_tokens"] == HIT * BLOCK
    assert not host.scheduler.reset_prefix_cache()
    check_integrity(host.scheduler.kv_cache_manager)
    _finish(host)
    assert host.free == before
    assert state_of(host)["pool"]["blocks_pinned"] == 0


def test_an_abort_unpins(host: Host) -> None:
    _donate(host)
    before = host.free
    host.add("a")
    host.step()
    host.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert host.free == before
    assert host.scheduler.reset_prefix_cache()


@pytest.mark.parametrize(
    ("salt", "hit"), [(None, 0), ("b", 0), ("a", HIT)], ids=["none", "other", "same"]
)
def test_another_salt_finds_nothing(host: Host, salt: str | None, hit: int) -> None:
    _donate(host, salt="a")
    host.add("a", salt=salt)
    assert _job(host).reused_tokens == hit * BLOCK
    _finish(host)


@pytest.mark.parametrize("missing", range(4))
def test_a_pool_of_exactly_hit_and_kept(missing: int) -> None:
    """With less it reads less; it never waits for what cannot come."""
    host = make_host(reuse="read", pool_blocks=1 + KEPT_BLOCKS + HIT - missing)
    # 11 blocks of the donor fit up to one missing; a shorter one leaves what fits.
    blocks = min(FULL, KEPT_BLOCKS + HIT - missing)
    host.add("donor", budget=None, tokens=blocks * BLOCK - 4, max_tokens=2)
    for _ in range(5):
        host.step()
    host.add("a")
    assert _job(host).reused_tokens == (HIT - missing) * BLOCK
    _finish(host)


def test_many_documents_in_a_small_pool() -> None:
    """What is pinned is not evicted, what is not may be; nobody waits for ever."""
    host = make_host(reuse="read", pool_blocks=1 + 3 * FULL)
    found, waiting = [], set()
    for index in range(18):
        name, salt = f"r{index}", str(index % 6)
        if index % 3 == 0:
            host.add(f"d{index}", budget=None, max_tokens=2, salt=salt)
        # Of another length each, or some were another one's twins.
        host.add(name, salt=salt, tokens=PROMPT + index)
        waiting.add(name)
    done: set[str] = set()
    for _ in range(400):
        _, orders = host.step(done=done)
        check_integrity(host.scheduler.kv_cache_manager)
        done = {job.request_id for job in orders.jobs}
        found += [job.reused_tokens for job in orders.jobs]
        waiting -= done
        if not host.scheduler.requests:
            break
    assert not host.scheduler.requests
    assert not waiting
    assert 0 < sum(tokens > 0 for tokens in found) < 18
    check_integrity(host.scheduler.kv_cache_manager, idle=True)


@pytest.mark.parametrize("shallow", [None, "full"])
def test_each_band_reads_blocks_of_its_own(shallow: str | None) -> None:
    host = make_host(reuse="read", bands=2, pool_blocks=60)
    _donate(host)
    host.add("a", shallow=shallow)
    first, second = _job(host).reused_block_ids
    assert len(first) == len(second) == HIT
    assert not set(first) & set(second)
    check_integrity(host.scheduler.kv_cache_manager)
    host.step(done={"a"}, report=report_of(3, 2))
    for _ in range(6):
        host.step()
    check_integrity(host.scheduler.kv_cache_manager, idle=True)
