"""vLLM's scheduler with requests of one pruned prompt: one prefill, shared blocks."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm.prefill import PrefillReport
from asl_vllm_testing.scheduler_host import (
    BLOCK,
    BUDGET,
    FREED,
    FULL,
    PROMPT,
    Host,
    make_host,
    states,
)

KEPT_BLOCKS = FULL - FREED
REPORT = PrefillReport(3, 700, 2000, 0.1, reused_tokens=64, reused_token_layers=640)


@pytest.fixture(params=[Scheduler, AsyncScheduler])
def host(request: pytest.FixtureRequest) -> Host:
    return make_host(reuse="read", scheduler_class=request.param)


def _step(host: Host, *done: str, failed: bool = False) -> tuple[list[str], list[str]]:
    """One step: names of the jobs ordered in it, and of the requests that run."""
    fail = set(done) if failed else None
    output, orders = host.step(done=set(done), failed=fail, report=REPORT)
    check_integrity(host.scheduler.kv_cache_manager)
    jobs = [job.request_id for job in orders.jobs]
    return jobs, list(output.num_scheduled_tokens)


def _row(host: Host, name: str) -> list[int]:
    (row,) = host.scheduler.kv_cache_manager.get_block_ids(name)
    return row[FREED:]


def _abort(host: Host, name: str) -> None:
    host.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    check_integrity(host.scheduler.kv_cache_manager)


def _to_the_end(host: Host) -> None:
    for _ in range(12):
        host.step()
    assert not host.scheduler.requests
    check_integrity(host.scheduler.kv_cache_manager, idle=True)


def test_eight_samples_take_one_prefill(host: Host) -> None:
    before, names = host.free, "abcdefgh"
    for name in names:
        host.add(name)
    assert _step(host) == (["a"], [])
    assert host.free == before - KEPT_BLOCKS
    assert _step(host, "a") == ([], [])
    output, orders = host.step()
    assert list(output.num_scheduled_tokens.values()) == [1] * 8
    assert orders.jobs == []
    # Whole blocks are everybody's; of the last each has its own.
    assert host.free == before - KEPT_BLOCKS - 7
    rows = [_row(host, name) for name in names]
    assert len({tuple(row[:-1]) for row in rows}) == 1
    assert len({row[-1] for row in rows}) == 8
    copies = output.kv_cache_block_copies
    assert copies is not None
    source = rows[0][-1]
    assert [(c.src_block_id, c.dst_block_id) for c in copies] == [
        (source, row[-1]) for row in rows[1:]
    ]
    check_integrity(host.scheduler.kv_cache_manager)
    _to_the_end(host)
    assert host.free == before


def test_what_twins_report(host: Host) -> None:
    host.add("a")
    host.add("b")
    _step(host)
    _step(host, "a")
    host.step()
    first, second = (output.kv_transfer_params for output in host.outputs)
    same = ("policy", "selection_layer", "kept_tokens", "pruned_tokens")
    assert all(first[name] == second[name] for name in same)
    assert first["skipped_token_layers"] == second["skipped_token_layers"] == 2000
    assert (first["shared_prefills"], second["shared_prefills"]) == (0, 1)
    assert (first["reused_tokens"], second["reused_tokens"]) == (64, PROMPT - 1)
    # What the other computed and read: with what was skipped, a full prefill.
    assert (first["reused_token_layers"], second["reused_token_layers"]) == (640, 1340)
    stats = [output.prefill_stats for output in host.outputs]
    assert [s.num_cached_tokens for s in stats if s is not None] == [0, PROMPT - 1]
    totals = host.connector.scheduler_side.tally.totals
    assert (totals["requests"], totals["computed_token_layers"]) == (2, 700)
    assert (totals["reused_tokens"], totals["shared_prefills"]) == (64, 1)
    assert [state[:2] for state in states(host)] == [
        ("a", "decoding"),
        ("b", "decoding"),
    ]
    _to_the_end(host)


def test_a_prompt_of_whole_blocks_is_not_copied(host: Host) -> None:
    """The last prompt token, which each computes, begins a block of its own."""
    host.add("a", tokens=10 * BLOCK + 1)
    host.add("b", tokens=10 * BLOCK + 1)
    _step(host)
    _step(host, "a")
    output, _ = host.step()
    assert len(output.num_scheduled_tokens) == 2
    assert not output.kv_cache_block_copies
    _to_the_end(host)


@pytest.mark.parametrize(
    "other",
    [
        {"salt": "s"},
        {"budget": BUDGET - BLOCK},
        {"policy": "snapkv"},
        {"reuse": "none"},
        {"tokens": PROMPT + 1},
        {"tokens": PROMPT + BLOCK},
    ],
    ids=str,
)
def test_nothing_else_is_a_twin(host: Host, other: dict[str, Any]) -> None:
    host.add("a")
    host.add("b", **other)
    jobs, _ = _step(host)
    jobs += _step(host, "a")[0]
    jobs += _step(host)[0]
    assert jobs == ["a", "b"]
    _step(host, "b")
    assert not set(_row(host, "a")) & set(_row(host, "b"))
    _to_the_end(host)


def test_no_twins_without_prefix_caching() -> None:
    """Then there are no hashes, in which the salt is."""
    host = make_host(reuse="read", engine={"enable_prefix_caching": False})
    host.add("a")
    host.add("b")
    jobs = _step(host)[0] + _step(host, "a")[0]
    assert jobs == ["a", "b"]
    _step(host, "b")
    _to_the_end(host)


def test_one_that_waits_for_its_twin_holds_nobody_up(host: Host) -> None:
    for name, salt in (("a", None), ("b", None), ("c", "s")):
        host.add(name, salt=salt)
    host.add("plain", budget=None, tokens=40)
    jobs, running = _step(host)
    assert (jobs, running) == (["a", "c"], ["plain"])
    _step(host, "a")
    assert set(_step(host, "c")[1]) >= {"a", "b"}
    _to_the_end(host)


@pytest.mark.parametrize("how", ["abort", "failure", "reset"])
def test_the_next_one_begins_where_the_first_comes_to_nothing(
    host: Host, how: str
) -> None:
    for name in "abc":
        host.add(name)
    assert _step(host)[0] == ["a"]
    if how == "abort":
        _abort(host, "a")
        jobs, _ = _step(host)
        leader = "b"
    elif how == "failure":
        _step(host, "a", failed=True)
        jobs, _ = _step(host)
        leader = "b"
    else:
        assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
        # Its name is taken until workers report that they dropped the job.
        _step(host, "a")
        jobs, _ = _step(host)
        leader = "a"
    assert jobs in ([leader], [])
    if not jobs:
        jobs, _ = _step(host)
    assert jobs == [leader]
    _step(host, leader)
    _, running = _step(host)
    assert set(running) == set(host.scheduler.requests)
    assert len(running) >= 2
    _to_the_end(host)


def test_any_twin_can_be_shared_with(host: Host) -> None:
    """Also with one that shares itself, once the first has ended."""
    host.add("a", max_tokens=1)
    host.add("b", max_tokens=6)
    _step(host)
    _step(host, "a")
    _step(host)
    _step(host)
    assert list(host.scheduler.requests) == ["b"]
    host.add("c")
    jobs, running = _step(host)
    assert (jobs, set(running)) == ([], {"b", "c"})
    assert _row(host, "b")[:-1] == _row(host, "c")[: len(_row(host, "b")) - 1]
    _to_the_end(host)


def test_a_preempted_one_takes_it_back_from_its_twin(host: Host) -> None:
    for name in "ab":
        host.add(name, max_tokens=8)
    _step(host)
    _step(host, "a")
    _step(host)
    scheduler = host.scheduler
    for _ in range(2):
        # Steps under way are looked at first.
        victim = scheduler.running.pop(0)
        assert victim.request_id in "ab"
        scheduler._preempt_request(victim, 0.0)
        check_integrity(scheduler.kv_cache_manager)
        jobs, running = _step(host)
        assert jobs == []
        assert set(running) == {"a", "b"}
    _to_the_end(host)


def test_a_block_for_the_copy_must_be_free() -> None:
    """Otherwise it waits; when its twin has gone it is prefilled itself."""
    host = make_host(reuse="read", pool_blocks=1 + KEPT_BLOCKS)
    host.add("a")
    host.add("b")
    assert _step(host)[0] == ["a"]
    jobs, running = _step(host, "a")
    while host.scheduler.requests.get("a"):
        assert jobs == []
        jobs, running = _step(host)
        assert "b" not in running
    if not jobs:
        jobs, _ = _step(host)
    assert jobs == ["b"]
    _step(host, "b")
    _to_the_end(host)


def test_bands_share_each_their_own() -> None:
    host = make_host(reuse="read", bands=2, pool_blocks=60)
    before = host.free
    for name in "ab":
        host.add(name)
    assert _step(host)[0] == ["a"]
    report = PrefillReport(3, 700, 2000, 0.1, pruned_bands=2)
    host.step(done={"a"}, report=report)
    output, _ = host.step()
    assert len(output.num_scheduled_tokens) == 2
    assert host.free == before - 2 * (KEPT_BLOCKS + 1)
    assert output.kv_cache_block_copies is not None
    assert len(output.kv_cache_block_copies) == 2
    check_integrity(host.scheduler.kv_cache_manager)
    _to_the_end(host)


def test_full_shallow_layers_are_each_ones_own() -> None:
    host = make_host(reuse="read", bands=2, pool_blocks=60)
    for name in "ab":
        host.add(name, shallow="full")
    jobs = _step(host)[0] + _step(host, "a")[0]
    assert jobs == ["a", "b"]
    _step(host, "b")
    _to_the_end(host)
