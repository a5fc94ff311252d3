"""vLLM's scheduler with our connector: the states of a pruned prompt."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from asl_vllm.engine.frontend.admission import usable_blocks
from asl_vllm.engine.messages import StepReports
from asl_vllm.engine.scheduler.metrics import OUTCOMES, PruningStats
from asl_vllm.engine.settings import settings_of
from asl_vllm.prefill import PrefillProgress
from asl_vllm_testing.scheduler_host import (
    BLOCK,
    BUDGET,
    FREED,
    FULL,
    KEPT,
    LAYERS,
    POOL,
    PROMPT,
    Host,
    make_host,
    report_of,
    state_of,
    states,
)


@pytest.fixture
def host() -> Host:
    return make_host()


def test_a_pruned_prompt_waits_for_its_load(host: Host) -> None:
    request = host.add("a")
    output, orders = host.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert output.total_num_scheduled_tokens == 0
    assert not output.has_sync_kv_loads
    (job,) = orders.jobs
    assert (job.request_id, job.num_prompt_tokens) == ("a", PROMPT)
    assert job.kept_tokens == KEPT
    assert orders.token_layers == host.step_tokens * 10
    (ids,) = host.scheduler.kv_cache_manager.get_block_ids("a")
    assert (job.bands, job.keep_shallow) == (1, False)
    first = job.pruned_blocks
    assert ids[:first] == [0] * first
    assert job.block_ids == [ids[first:]]
    assert job.slots().tolist()[0] == [
        ids[position // BLOCK] * BLOCK + position % BLOCK
        for position in range(job.pruned_tokens, PROMPT - 1)
    ]
    # Nothing more is ordered while it waits.
    for _ in range(3):
        output, orders = host.step()
        assert output.total_num_scheduled_tokens == 0
        assert orders.jobs == []


def test_once_loaded_the_last_prompt_token_is_an_ordinary_step(host: Host) -> None:
    start = host.free
    request = host.add("a")
    host.step()
    host.step(done={"a"})
    output, _ = host.step()
    assert output.num_scheduled_tokens == {"a": 1}
    assert request.num_computed_tokens == PROMPT
    (new,) = output.scheduled_new_reqs
    assert new.num_computed_tokens == PROMPT - 1
    for _ in range(3):
        host.step()
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert host.outputs[-1].kv_transfer_params == {
        "policy": "asl",
        "budget_tokens": BUDGET,
        "selection_layer": 3,
        "kept_tokens": KEPT,
        "pruned_tokens": PROMPT - KEPT,
        "freed_blocks": (PROMPT - KEPT) // BLOCK,
        "skipped_token_layers": 2000,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
    }
    assert host.free == start


def test_the_first_token_comes_with_the_report(host: Host) -> None:
    """A front end that ends the request afterwards is told nothing more."""
    for name, budget in (("pruned", BUDGET), ("unpruned", PROMPT), ("plain", None)):
        host.add(name, budget=budget)
    told: dict[str, list[Any]] = {}
    for done in (None, {"pruned"}, None, None, None):
        host.step(done=done)
        for output in host.outputs:
            told.setdefault(output.request_id, []).append(output.kv_transfer_params)
    assert told["plain"] == [None] * len(told["plain"])
    for name, kept in (("pruned", KEPT), ("unpruned", PROMPT)):
        first, *others = told[name]
        assert (first["policy"], first["kept_tokens"]) == ("asl", kept)
        assert others[0] is None


def test_a_stop_string_is_no_client_that_went_away(host: Host) -> None:
    """It ends a request by an abort of the front end's, after a token."""
    host.scheduler.log_stats = False
    host.add("stopped", stop=["9"])
    host.add("gone")
    host.step()
    host.step(done={"stopped", "gone"})
    host.step()
    host.add("gone early", stop=["9"])
    host.step()
    for name in ("stopped", "gone", "gone early"):
        host.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    ended = host.connector.scheduler_side.tally.take(0).data["ended"]
    assert ended == {"asl": {"pruned": 1, "aborted": 2}}


def test_a_pruned_prompt_is_scheduled_when_its_prefill_is_ordered(host: Host) -> None:
    """vLLM's queue ends, and its prefill begins, with the first such event."""
    request = host.add("a")
    before = time.monotonic()
    host.step()
    after = time.monotonic()
    kinds = [event.type for event in request.events]
    assert kinds == [EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED]
    assert before <= request.events[1].timestamp <= after


def test_a_failed_load_fails_its_request(host: Host) -> None:
    start = host.free
    host.add("a")
    host.step()
    host.step(done={"a"}, failed={"a"})
    (output,) = host.outputs
    assert str(output.finish_reason) == "error"
    assert host.free == start
    assert not host.scheduler.requests


def test_an_abort_after_the_report_frees_at_once(host: Host) -> None:
    start = host.free
    host.add("a")
    host.step()
    host.step(done={"a"})
    host.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert host.free == start


def test_none_leaves_a_request_waiting_without_blocks(host: Host) -> None:
    """Enough prompts in flight: the others hold nothing and keep their order."""
    requests = [host.add(name) for name in "abcd"]
    _, orders = host.step()
    admitted = [job.request_id for job in orders.jobs]
    assert admitted == ["a", "b"]
    assert [r.status for r in requests[2:]] == [RequestStatus.WAITING] * 2
    for name in "cd":
        assert host.scheduler.kv_cache_manager.get_block_ids(name) == ([],)
    _, orders = host.step(done={"a"})
    assert orders.jobs == []
    _, orders = host.step()
    assert [job.request_id for job in orders.jobs] == ["c"]


def test_a_preempted_request_is_loaded_again(host: Host) -> None:
    request = host.add("a")
    host.step()
    host.step(done={"a"})
    host.step()
    output, _ = host.step()
    assert output.num_scheduled_tokens == {"a": 1}
    (victim,) = host.scheduler.running
    host.scheduler.running.remove(victim)
    host.scheduler._preempt_request(victim, 0.0)
    assert request.num_computed_tokens == 0
    _, orders = host.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    (job,) = orders.jobs
    assert job.num_prompt_tokens == PROMPT, "generated tokens are none of the prompt"
    host.step(done={"a"})
    output, _ = host.step()
    # The last prompt token and the two that were generated.
    assert output.num_scheduled_tokens == {"a": 3}


def test_requests_without_a_budget_do_not_meet_the_connector(host: Host) -> None:
    start = host.free
    request = host.add("a", budget=None, tokens=BLOCK)
    output, orders = host.step()
    assert output.num_scheduled_tokens == {"a": BLOCK}
    assert orders.jobs == []
    assert orders.token_layers == (host.step_tokens - BLOCK) * 10
    for _ in range(3):
        host.step()
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert host.outputs[-1].kv_transfer_params is None
    assert host.free == start


@pytest.mark.parametrize(
    ("share", "given"),
    [
        (1.0, [2560, 2550, 1560, 0, 0]),
        (0.5, [1280, 1280, 1280, 0, 0]),
        # At least one, or a prompt would never end.
        (0.0001, [1, 1, 1, 0, 0]),
    ],
)
def test_passes_get_what_a_step_leaves_and_no_more_than_their_share(
    share: float, given: list[int]
) -> None:
    """Of steps of 256 tokens through ten layers."""
    side = make_host(pass_share=share).connector.scheduler_side
    scheduled = (0, 1, 100, 256, 261)
    assert [side.orders(tokens).token_layers for tokens in scheduled] == given


@pytest.mark.parametrize("bands", [2, 5, 10])
@pytest.mark.parametrize("selection_layer", [*range(LAYERS), None])
def test_blocks_held_with_full_shallow_layers(
    selection_layer: int | None, bands: int
) -> None:
    """At admission every band's, then only the shallow ones'."""
    host = make_host(bands=bands, pool_blocks=bands * POOL)
    start = host.free
    report = report_of(selection_layer, bands)
    deep = report.pruned_bands
    request = host.add("a", shallow="full", max_tokens=2 * BLOCK)
    _, orders = host.step()
    (job,) = orders.jobs
    assert (job.bands, job.keep_shallow) == (bands, True)
    assert job.slots().unique().numel() == job.slots().numel() == bands * (PROMPT - 1)
    assert host.held("a") == [FULL] * bands
    host.step(done={"a"}, report=report)
    while request.num_output_tokens < 2 * BLOCK - 1:
        host.step()
        cached = PROMPT + request.num_output_tokens - 1
        blocks = -(-cached // BLOCK)
        assert host.held("a") == [blocks] * (bands - deep) + [blocks - FREED] * deep
        assert host.free == start - sum(host.held("a"))
    while host.scheduler.requests:
        host.step()
    reply = host.outputs[-1].kv_transfer_params
    assert reply["freed_blocks"] == FREED * deep
    assert reply["kept_tokens"] == (KEPT if deep else PROMPT)
    assert host.free == start


def test_bands_alone_hold_what_one_block_table_holds() -> None:
    host = make_host(bands=5, pool_blocks=5 * POOL)
    # The null block makes one band's share a block smaller, and so all of them.
    assert state_of(host)["pool_tokens"] == (POOL - 1) * BLOCK
    host.add("a")
    _, orders = host.step()
    (job,) = orders.jobs
    assert not job.keep_shallow
    assert job.slots().shape == (5, KEPT - 1)
    assert host.held("a") == [FULL - FREED] * 5


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("bands", [1, 5])
def test_the_pool_that_the_api_names_is_the_one_that_admission_enforces(
    bands: int, drafts: int
) -> None:
    host = make_host(bands=bands, drafts=drafts)
    blocks = usable_blocks(settings_of(host.scheduler.vllm_config))
    assert blocks == (POOL - 1) // bands - bool(drafts)
    assert state_of(host)["pool_tokens"] == blocks * BLOCK


def test_a_preempted_request_takes_all_its_blocks_again_and_frees_them_again() -> None:
    """The second prefill may select elsewhere: on a GPU sums may round otherwise."""
    host = make_host(bands=5, pool_blocks=5 * POOL)
    start = host.free
    host.add("a", shallow="full")
    host.step()
    host.step(done={"a"}, report=report_of(3, 5))
    host.step()
    assert host.held("a") == [FULL] * 2 + [FULL - FREED] * 3
    (victim,) = host.scheduler.running
    host.scheduler.running.remove(victim)
    host.scheduler._preempt_request(victim, 0.0)
    host.step()
    assert host.held("a") == [FULL] * 5
    host.step(done={"a"}, report=report_of(7, 5))
    host.step()
    assert host.held("a") == [FULL] * 4 + [FULL - FREED]
    host.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert host.free == start


@pytest.mark.parametrize("reported", [False, True])
def test_an_abort_with_full_shallow_layers_frees_all(reported: bool) -> None:
    host = make_host(bands=5, pool_blocks=5 * POOL)
    start = host.free
    host.add("a", shallow="full")
    host.step()
    if reported:
        host.step(done={"a"}, report=report_of(3, 5))
    host.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    host.step(done=None if reported else {"a"}, report=report_of(3, 5))
    assert host.free == start
    assert not host.scheduler.requests
    again = host.add("a", budget=None, tokens=BLOCK)
    host.step()
    assert 0 not in host.scheduler.kv_cache_manager.get_block_ids("a")[4]
    assert again.block_hashes


def test_requests_without_a_budget_share_prefixes_in_bands() -> None:
    host = make_host(bands=5, pool_blocks=5 * POOL)
    host.add("a", budget=None, tokens=3 * BLOCK + 1)
    host.step()
    host.add("b", budget=None, tokens=3 * BLOCK + 5)
    output, _ = host.step()
    (new,) = output.scheduled_new_reqs
    assert new.num_computed_tokens == 3 * BLOCK


def test_others_go_on_beside_a_load(host: Host) -> None:
    host.add("a")
    host.add("b", budget=None, tokens=BLOCK)
    output, orders = host.step()
    assert output.num_scheduled_tokens == {"b": BLOCK}
    assert [job.request_id for job in orders.jobs] == ["a"]
    output, _ = host.step()
    assert output.num_scheduled_tokens == {"b": 1}


def test_only_pruned_requests_may_lose_their_hashes(host: Host) -> None:
    """vLLM caches the full blocks of any other, and needs a hash of each.

    Without it 0.32 fails and newer lines leave the block out.
    """
    pruned = host.add("a")
    assert pruned.block_hashes == []
    assert pruned._block_hasher is None
    plain = host.add("b", budget=None, tokens=BLOCK)
    assert len(plain.block_hashes) == 1
    plain.block_hashes = []
    with contextlib.suppress(IndexError):
        host.step()
    pool = host.scheduler.kv_cache_manager.block_pool
    assert [b.block_id for b in pool.blocks if b.block_hash is not None] == []


def test_skip_reading_prefix_cache_makes_vllm_ignore_connectors(host: Host) -> None:
    """Why prompt_logprobs, which sets it, cannot be combined with a budget."""
    request = host.add("a", prompt_logprobs=1)
    assert request.skip_reading_prefix_cache
    output, orders = host.step()
    assert orders.jobs == []
    assert output.num_scheduled_tokens == {"a": host.step_tokens}


def test_the_manager_is_bound_after_the_pool_is_made(host: Host) -> None:
    manager = host.scheduler.kv_cache_manager
    assert len(manager.coordinator.single_type_managers) == 1
    assert manager.block_pool.num_gpu_blocks == POOL


def test_what_happened_is_counted(host: Host) -> None:
    """Each way to end; the steps' own statistics took nothing of it."""
    host.scheduler.log_stats = False
    taken: list[dict[str, Any]] = []
    take = host.connector.scheduler_side.tally.take

    def keep(pinned_blocks: int) -> Any:
        taken.append(take(pinned_blocks).data)

    host.connector.scheduler_side.tally.take = keep  # type: ignore[method-assign]
    host.add("pruned")
    host.add("failed")
    host.step()
    host.step(done={"pruned", "failed"}, failed={"failed"})
    for _ in range(6):
        host.step()
    host.add("unpruned", budget=PROMPT)
    for _ in range(6):
        host.step()
    host.add("aborted")
    host.step()
    host.scheduler.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    host.step(done={"aborted"}, failed={"aborted"})
    host.add("plain", budget=None, tokens=BLOCK)
    for _ in range(6):
        host.step()
    assert not host.scheduler.requests
    total = PruningStats()
    for data in taken:
        total.aggregate(PruningStats(data))
    assert total.data == {
        "ended": {"asl": {"pruned": 1, "failed": 1, "unpruned": 1, "aborted": 1}},
        "reuse": {"none": 1},
        "pinned_blocks": [],
        "selection_layer": [3],
        "kept_tokens": [KEPT],
        "prefill_seconds": [0.1],
        "pruned_tokens": PROMPT - KEPT,
        "freed_blocks": (PROMPT - KEPT) // BLOCK,
        "computed": 1000,
        "skipped": 2000,
        "reused": 0,
        "rerun": 0,
        "reused_tokens": 0,
        "filled_tokens": 0,
    }
    assert set(total.data["ended"]["asl"]) == set(OUTCOMES)


def test_a_preempted_prompt_is_counted_once(host: Host) -> None:
    host.add("a")
    host.step()
    host.step(done={"a"})
    host.step()
    host.step()
    (victim,) = host.scheduler.running
    host.scheduler.running.remove(victim)
    host.scheduler._preempt_request(victim, 0.0)
    assert states(host) == [("a", "waiting", 0, None, 0)]
    host.step()
    assert states(host)[0][1] == "waiting"
    host.step(done={"a"})
    assert host.connector.scheduler_side.tally.totals == {
        "requests": 1,
        "pruned_tokens": PROMPT - KEPT,
        "skipped_token_layers": 4000,
        "computed_token_layers": 2000,
        "reused_tokens": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
    }


def test_an_engines_state(host: Host) -> None:
    """A request's way through the pool and the layers, as front ends are told."""
    side = host.connector.scheduler_side
    idle = state_of(host)
    assert idle["index"] == 1
    assert idle["pool"] == {
        "block_size": BLOCK,
        "blocks_total": POOL - 1,
        "blocks_used": 0,
        "blocks_free": POOL - 1,
        "blocks_pinned": 0,
        "tokens_saved": 0,
        "usage": 0.0,
    }
    assert idle["pool_tokens"] == (POOL - 1) * BLOCK
    # Keys and values, 2 heads of 32 in fp32, ten layers, two ranks.
    assert idle["kv_bytes_per_token"] == 2 * 2 * 32 * 4 * 10 * 2
    assert (idle["num_layers"], idle["requests"]) == (10, [])
    for name in "ab":
        host.add(name)
    assert states(host) == [(name, "waiting", 0, None, 0) for name in "ab"]
    host.step()
    held = -(-KEPT // BLOCK)
    assert states(host) == [(name, "waiting", 0, None, held) for name in "ab"]
    progress = StepReports({}, {"a": PrefillProgress(4, 3)})
    side.on_output(KVConnectorOutput(kv_connector_worker_meta=progress))
    assert states(host)[0] == ("a", "prefilling", 4, 3, held)
    assert state_of(host)["pool"]["tokens_saved"] == 2 * (PROMPT - KEPT)
    host.step(done={"a"})
    assert states(host) == [
        ("a", "decoding", 10, 3, held),
        ("b", "waiting", 0, None, held),
    ]
    request = state_of(host)["requests"][0]
    assert (request["num_prompt_tokens"], request["kept_tokens"]) == (PROMPT, KEPT)
    assert (request["policy"], request["budget"]) == ("asl", BUDGET)
    pool = state_of(host)["pool"]
    assert pool["blocks_used"] == 2 * held == POOL - 1 - pool["blocks_free"]
    assert pool["usage"] == round(2 * held / (POOL - 1), 6)
    host.step(done={"b"})
    for _ in range(6):
        host.step()
    assert state_of(host)["requests"] == []
    assert state_of(host)["pool"] == idle["pool"]
    assert state_of(host)["totals"]["requests"] == 2


def test_null_blocks_of_a_freed_row_go_nowhere(host: Host) -> None:
    """They lead a pruned row; newer lines count no references to the null block."""
    pool = host.scheduler.kv_cache_manager.block_pool
    before = host.free
    host.add("a")
    host.step()
    host.step(done={"a"})
    ((row,),) = [host.scheduler.kv_cache_manager.get_block_ids("a")]
    assert row[:FREED] == [pool.null_block.block_id] * FREED
    while host.scheduler.requests:
        host.step()
    assert host.free == before
    free = [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]
    assert len(set(free)) == len(free) == before
    assert pool.null_block.block_id not in free


@pytest.mark.parametrize("drafts", [0, 3, 31, 40])
@pytest.mark.parametrize("scheduler_class", [Scheduler, AsyncScheduler])
def test_a_request_of_the_largest_size_is_never_preempted(
    scheduler_class: type[Scheduler], drafts: int
) -> None:
    """Drafts of every step in flight need room beside what a request may grow to.

    0.33 drafts by n-gram in asynchronous steps, two of them in flight.
    """
    host = make_host(scheduler_class=scheduler_class, drafts=drafts)
    config = host.scheduler.vllm_config
    blocks = usable_blocks(settings_of(config))
    assert blocks is not None
    prompt = 5 * BLOCK
    request = host.add(
        "a", budget=None, tokens=prompt, max_tokens=blocks * BLOCK - prompt + 1
    )
    flying: list[SchedulerOutput] = []
    while host.scheduler.requests:
        flying.append(host.scheduler.schedule())
        if len(flying) == config.max_concurrent_batches:
            # No draft is right: the request grows by one token a step.
            host.answer(flying.pop(0))
    assert request.is_finished()
    assert request.num_output_tokens == request.max_tokens
    assert request.num_preemptions == 0
