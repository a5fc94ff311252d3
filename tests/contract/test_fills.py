"""vLLM's scheduler with pruned prompts whose prefix is put into its cache first."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm.engine.scheduler.metrics import PruningStats
from asl_vllm.prefill import PrefillReport
from asl_vllm_testing.scheduler_host import (
    BLOCK,
    FREED,
    FULL,
    PROMPT,
    Host,
    make_host,
    state_of,
)

HIT = (PROMPT - 8) // BLOCK
"""Blocks before the window."""
KEPT_BLOCKS = FULL - FREED
READ = PrefillReport(3, 700, 2000, 0.1, reused_tokens=HIT * BLOCK)


def _host(**options: Any) -> Host:
    """A step has room for a prompt: the host gives each chunk a token."""
    host = make_host(step_tokens=2048, **options)
    tally = host.connector.scheduler_side.tally
    take = tally.take
    TAKEN.clear()

    def taking(pinned_blocks: int) -> PruningStats:
        TAKEN.append(take(pinned_blocks))
        return copy.deepcopy(TAKEN[-1])

    tally.take = taking  # type: ignore[method-assign]
    return host


TAKEN: list[PruningStats] = []
NAMES = {"a", "b", "donor", "hit", "miss", "other", *(f"r{i}" for i in range(18))}


def is_fill(name: str) -> bool:
    return name not in NAMES


@pytest.fixture(params=[Scheduler, AsyncScheduler])
def host(request: pytest.FixtureRequest) -> Host:
    return _host(reuse="fill", scheduler_class=request.param)


def _step(host: Host, *done: str, report: PrefillReport = READ) -> tuple[Any, Any]:
    """One step: names of the jobs ordered in it, and of the requests that run."""
    output, orders = host.step(done=set(done), report=report)
    check_integrity(host.scheduler.kv_cache_manager)
    assert not any(is_fill(part.request_id) for part in host.outputs)
    jobs = {job.request_id: job.reused_tokens for job in orders.jobs}
    return jobs, dict(output.num_scheduled_tokens)


def _tally(host: Host) -> dict[str, Any]:
    """What all steps counted: each hands its counts to vLLM, `_host` keeps them."""
    total = PruningStats()
    for stats in TAKEN:
        total.aggregate(stats)
    return total.data


def _fills(host: Host) -> list[str]:
    return [name for name in host.scheduler.requests if is_fill(name)]


def _until_filled(host: Host) -> None:
    for _ in range(8):
        _step(host)
        if not _fills(host):
            return
    raise AssertionError("the fill does not end")


def _to_the_end(host: Host, *done: str) -> None:
    _step(host, *done)
    for _ in range(12):
        _step(host)
    assert not host.scheduler.requests
    check_integrity(host.scheduler.kv_cache_manager, idle=True)


def test_a_prefix_is_computed_by_vllm_and_then_read(host: Host) -> None:
    host.add("a", max_tokens=2)
    assert _step(host) == ({}, {})
    (fill,) = _fills(host)
    # As any other request; what the window is scored with is not its.
    assert host.scheduler.requests[fill].num_tokens == HIT * BLOCK
    assert _step(host) == ({}, {fill: HIT * BLOCK})
    jobs: dict[str, int] = {}
    while not jobs:
        jobs, _ = _step(host)
    assert jobs == {"a": HIT * BLOCK}
    _step(host, "a")
    for _ in range(4):
        _step(host)
        for part in host.outputs:
            if part.finish_reason is not None:
                told = part.kv_transfer_params
            if part.prefill_stats is not None:
                cached = part.prefill_stats.num_cached_tokens
    assert told["filled_tokens"] == told["reused_tokens"] == HIT * BLOCK
    # To its client nothing of it was there.
    assert cached == 0
    data = _tally(host)
    assert data["reuse"] == {"filled": 1}
    assert data["filled_tokens"] == HIT * BLOCK
    _to_the_end(host)


def test_what_is_there_needs_no_fill(host: Host) -> None:
    host.add("donor", budget=None, max_tokens=2)
    for _ in range(6):
        _step(host)
    host.add("a")
    jobs, _ = _step(host)
    assert jobs == {"a": HIT * BLOCK}
    assert not _fills(host)
    _to_the_end(host, "a")
    data = _tally(host)
    assert data["reuse"] == {"hit": 1}
    assert data["filled_tokens"] == 0


def test_a_part_that_is_there_is_not_filled_again(host: Host) -> None:
    """What the fill found was in the cache to the client too."""
    host.add("donor", budget=None, tokens=5 * BLOCK, max_tokens=2)
    for _ in range(6):
        _step(host)
    host.add("a")
    _until_filled(host)
    _step(host)
    side = host.connector.scheduler_side
    assert side.fills.filled_tokens("a") == (HIT - 5) * BLOCK
    _to_the_end(host, "a")


def test_a_hit_overtakes_a_miss(host: Host) -> None:
    host.add("donor", budget=None, max_tokens=2, salt="here")
    for _ in range(6):
        _step(host)
    host.add("miss", tokens=20 * BLOCK, salt="elsewhere")
    host.add("hit", salt="here")
    jobs, _ = _step(host)
    assert jobs == {"hit": HIT * BLOCK}
    _step(host, "hit")
    _until_filled(host)
    _to_the_end(host, "miss")


def test_several_hits_start_in_one_step(host: Host) -> None:
    """Their tokens are not computed, so a step has room for them."""
    host.add("donor", budget=None, max_tokens=2)
    for _ in range(6):
        _step(host)
    names = [f"r{index}" for index in range(4)]
    for index, name in enumerate(names):
        host.add(name, tokens=PROMPT + index)
    jobs, _ = _step(host)
    assert list(jobs) == names
    _to_the_end(host, *names)


def test_samples_share_a_fill_and_a_prefill(host: Host) -> None:
    names = [f"r{index}" for index in range(4)]
    for name in names:
        host.add(name)
    _step(host)
    assert len(_fills(host)) == 1
    jobs: dict[str, int] = {}
    while not jobs:
        jobs, _ = _step(host)
    assert jobs == {"r0": HIT * BLOCK}
    _to_the_end(host, "r0")
    data = _tally(host)
    assert data["reuse"] == {"filled": 1, "shared": 3}
    assert data["filled_tokens"] == HIT * BLOCK


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_at_any_moment_ends_the_fill(host: Host, steps: int) -> None:
    free = host.free
    host.add("a")
    for _ in range(steps):
        _step(host)
    host.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert not _fills(host)
    assert not host.scheduler.requests
    assert host.free == free
    check_integrity(host.scheduler.kv_cache_manager, idle=True)
    assert host.scheduler.reset_prefix_cache()


def test_a_fill_goes_on_for_whoever_else_waits(host: Host) -> None:
    host.add("a")
    host.add("b")
    _step(host)
    host.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert len(_fills(host)) == 1
    _until_filled(host)
    _to_the_end(host, "b")


def test_all_are_ended_at_once(host: Host) -> None:
    host.add("a")
    _step(host)
    _step(host)
    host.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not host.scheduler.requests
    check_integrity(host.scheduler.kv_cache_manager, idle=True)


def test_a_reset_has_it_begin_anew(host: Host) -> None:
    host.add("a")
    _step(host)
    _step(host)
    assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
    _until_filled(host)
    _to_the_end(host, "a")


def test_evicted_before_it_is_read(host: Host) -> None:
    """Each request fills at most once, and begins with what is there."""
    host.add("a")
    _until_filled(host)
    side = host.connector.scheduler_side
    if not side.is_loading("a"):
        assert host.scheduler.reset_prefix_cache()
        jobs, _ = _step(host)
        assert jobs == {"a": 0}
    _to_the_end(host, "a")


@pytest.mark.parametrize("order", ["fcfs", "priority"])
def test_a_fill_is_the_next_in_the_queue(order: str) -> None:
    host = _host(reuse="fill", engine={"scheduling_policy": order})
    host.add("a")
    _step(host)
    host.add("other", budget=None, salt="other")
    (fill,) = _fills(host)
    queue = [request.request_id for request in host.scheduler.waiting]
    assert queue.index(fill) < queue.index("other")
    _until_filled(host)
    _to_the_end(host, "a")


def test_a_fill_that_comes_to_nothing(host: Host) -> None:
    """Its prompt is pruned all the same, from scratch."""
    host.add("a")
    _step(host)
    (fill,) = _fills(host)
    assert host.scheduler.finish_requests(fill, RequestStatus.FINISHED_ERROR) == []
    jobs, _ = _step(host)
    assert jobs == {"a": 0}
    _step(host, "a", report=dataclasses.replace(READ, reused_tokens=0))
    _to_the_end(host)
    assert _tally(host)["filled_tokens"] == 0
    assert _tally(host)["reuse"] == {"miss": 1}


def test_a_client_may_call_its_request_like_a_fill(host: Host) -> None:
    host.add("a")
    _step(host)
    (fill,) = _fills(host)
    name = f"asl-fill-{fill[-4:]}"
    host.add(name, budget=None, tokens=20, max_tokens=2, salt="other")
    heard = 0
    while name in host.scheduler.requests:
        host.step()
        heard += sum(part.request_id == name for part in host.outputs)
        assert fill not in {part.request_id for part in host.outputs}
    assert heard == 2


def test_another_salt_shares_nothing(host: Host) -> None:
    host.add("a", salt="a")
    host.add("b", salt="b")
    _step(host)
    first, second = _fills(host)
    hashes = [host.scheduler.requests[name].block_hashes for name in (first, second)]
    assert not set(hashes[0]) & set(hashes[1])
    _until_filled(host)
    _to_the_end(host, "a", "b")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_prompt_that_does_not_fit_is_not_filled(missing: int) -> None:
    host = _host(reuse="fill", pool_blocks=1 + KEPT_BLOCKS + HIT - missing)
    host.add("a")
    jobs, _ = _step(host)
    assert len(_fills(host)) == 1 - missing
    if missing:
        assert jobs == {"a": 0}
    else:
        _until_filled(host)
    _to_the_end(host, "a")


def test_no_fill_while_others_hold_the_pool() -> None:
    """It would wait for them, and those behind it with it."""
    host = _host(reuse="fill", pool_blocks=20)
    host.add("other", budget=None, max_tokens=60, salt="other")
    for _ in range(3):
        _step(host)
    host.add("a")
    jobs, _ = _step(host)
    assert jobs == {"a": 0}
    assert not _fills(host)
    assert state_of(host)["requests"][0]["state"] == "waiting"
    host.scheduler.finish_requests("other", RequestStatus.FINISHED_ABORTED)
    _to_the_end(host, "a")


def test_many_documents_in_a_small_pool() -> None:
    host = _host(reuse="fill", pool_blocks=1 + 3 * FULL)
    waiting = {f"r{index}" for index in range(18)}
    for index in range(18):
        host.add(f"r{index}", salt=str(index % 6), tokens=PROMPT + index)
    done: set[str] = set()
    found = []
    for _ in range(400):
        jobs, _ = _step(host, *done)
        found += jobs.values()
        waiting -= set(jobs)
        done = set(jobs)
        if not waiting and not host.scheduler.requests:
            break
    assert not waiting
    assert not host.scheduler.requests
    check_integrity(host.scheduler.kv_cache_manager, idle=True)
    assert sum(tokens > 0 for tokens in found) > 12


@pytest.mark.parametrize("bands", [2, 5])
def test_bands(bands: int) -> None:
    host = _host(reuse="fill", bands=bands, pool_blocks=40 * bands)
    host.add("a")
    _until_filled(host)
    jobs, _ = _step(host)
    assert jobs == {"a": HIT * BLOCK}
    host.step(done={"a"}, report=dataclasses.replace(READ, pruned_bands=bands))
    _to_the_end(host)


def test_off_without_prefix_caching() -> None:
    host = _host(reuse="fill", engine={"enable_prefix_caching": False})
    host.add("a")
    jobs, _ = _step(host)
    assert jobs == {"a": 0}
    assert not _fills(host)
