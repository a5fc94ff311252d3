"""Answers depend on the request alone: not on others, not on what memory held."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from asl_vllm.engine.scheduler.integrity import IntegrityError
from asl_vllm.selection.policies import Keep
from asl_vllm_testing.harness import (
    BLOCK,
    Engine,
    Running,
    add,
    assert_pool_whole,
    drain,
    engine,
    random_prompt,
    run_to_end,
    step,
)
from asl_vllm_testing.poison import (
    HUGE,
    poison_unowned,
    poisoned_prefills,
    pool_memory,
    prefill_memory,
)
from tests.e2e.recording import Decisions, record

POOL_TOKENS = 1024
RULE = {"window": 16, "l_min": 2, "l_obs": 3, "tau": 0.6}


@pytest.fixture(scope="module")
def host(random_model: Path) -> Iterator[Engine]:
    with engine(
        random_model,
        policy={"policy": "asl", **RULE, "check_integrity": True},
        pool_tokens=POOL_TOKENS,
        max_num_batched_tokens=256,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def _nothing_is_left(host: Engine) -> Iterator[None]:
    yield
    drain(host)
    assert_pool_whole(host)


SHARED = random_prompt(320, seed=1)
TOKENS = 20
TENANTS: dict[str, tuple[list[int], int | None]] = {
    "pruned": (SHARED + random_prompt(90, seed=2), 96),
    "plain": (SHARED + random_prompt(40, seed=3), None),
    "same": (SHARED + random_prompt(90, seed=2), None),
    "tighter": (SHARED + random_prompt(60, seed=4), 64),
}
"""All begin alike; "same" is the prompt of "pruned", not pruned."""


@pytest.fixture(scope="module")
def alone(host: Engine) -> dict[str, list[int]]:
    """Each one's answer in an engine that nothing else is asked of."""
    answers = {}
    for name, (ids, budget) in TENANTS.items():
        host.llm.reset_prefix_cache()
        request = add(host, name, ids, budget=budget, max_tokens=TOKENS)
        run_to_end(host, request)
        answers[name] = request.tokens
    assert len({tuple(answer) for answer in answers.values()}) == len(TENANTS)
    return answers


@pytest.mark.parametrize("gap", [0, 4, 9])
def test_tenants_see_only_their_own_tokens(
    host: Engine, alone: dict[str, list[int]], gap: int
) -> None:
    """Every order of arrival, ``gap`` steps apart, in memory full of poison."""
    orders = list(itertools.permutations(TENANTS))
    if gap:  # A third of the orders.
        orders = orders[gap % 3 :: 3]
    poisoned = 0
    with poisoned_prefills(host):
        for order in orders:
            live: list[Running] = []
            for name in order:
                ids, budget = TENANTS[name]
                live.append(add(host, name, ids, budget=budget, max_tokens=TOKENS))
                for _ in range(gap):
                    poisoned += poison_unowned(host)
                    step(host, *live)
                    host.check()
            while not all(request.finished for request in live):
                poisoned += poison_unowned(host)
                step(host, *live)
            host.check()
            got = {request.external_id: request.tokens for request in live}
            assert got == alone, order
    assert poisoned > 100


def test_poison_that_is_read_shows(host: Engine, alone: dict[str, list[int]]) -> None:
    """The counterpart: one of a request's own blocks is enough."""
    ids, budget = TENANTS["pruned"]
    request = add(host, "read", ids, budget=budget, max_tokens=TOKENS)
    while request.num_generated < 3:
        step(host, request)
    (row,) = host.scheduler.kv_cache_manager.get_block_ids(request.request_id)
    for cache in pool_memory(host):
        cache[row[-2]] = HUGE
    run_to_end(host, request)
    assert request.tokens != alone["pruned"]


def test_blocks_of_an_aborted_prefill_show_nothing(
    host: Engine, alone: dict[str, list[int]]
) -> None:
    for steps in (1, 2, 4, 6):
        doomed = add(host, "doomed", random_prompt(3000, seed=9), budget=200)
        for _ in range(steps):
            step(host, doomed)
        host.llm.llm_engine.abort_request([doomed.request_id], internal=True)
        pair = [
            add(
                host, name, TENANTS[name][0], budget=TENANTS[name][1], max_tokens=TOKENS
            )
            for name in ("tighter", "plain")
        ]
        run_to_end(host, *pair)
        for request in pair:
            assert request.tokens == alone[request.external_id]


# The same prompt and budget: the same selection and tokens.


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Decisions:
    return record(monkeypatch, "asl")


PROMPT = random_prompt(700, seed=20)


def once(host: Engine, decisions: Decisions) -> tuple[list[int], Any, list[Any]]:
    """Tokens, report and decisions of `PROMPT` alone."""
    decisions.clear()
    request = add(host, "once", PROMPT, budget=128, max_tokens=24)
    run_to_end(host, request)
    return request.tokens, request.output.kv_transfer_params, decisions.of_prompt[-1]


def assert_same_decisions(got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine.kept, other.kept)
        if mine.deeper is Keep.ALL or other.deeper is Keep.ALL:
            assert mine.deeper is other.deeper
        else:
            assert torch.equal(mine.deeper, other.deeper)


def test_neighbours_and_repetition_change_nothing(
    host: Engine, decisions: Decisions
) -> None:
    want_tokens, want_report, want = once(host, decisions)
    assert want_report["selection_layer"] is not None
    decisions.clear()
    crowd = [
        add(host, "before", random_prompt(400, seed=21), budget=64, max_tokens=30),
        add(host, "beside", random_prompt(90, seed=22), max_tokens=30),
        add(host, "again", PROMPT, budget=128, max_tokens=24),
        add(host, "after", random_prompt(500, seed=23), budget=96, max_tokens=30),
    ]
    run_to_end(host, *crowd)
    assert crowd[2].tokens == want_tokens
    assert crowd[2].output.kv_transfer_params == want_report
    assert_same_decisions(decisions.of_prompt[1], want)


@pytest.mark.parametrize("generated", [1, 9])
def test_preemption_changes_nothing(
    host: Engine, decisions: Decisions, generated: int
) -> None:
    want_tokens, want_report, want = once(host, decisions)
    request = add(host, "preempted", PROMPT, budget=128, max_tokens=24)
    while request.num_generated < generated:
        step(host, request)
    (victim,) = host.scheduler.running
    host.scheduler.running.remove(victim)
    host.scheduler._preempt_request(victim, 0.0)
    poison_unowned(host)
    run_to_end(host, request)
    assert victim.num_preemptions == 1
    assert request.tokens == want_tokens
    assert request.output.kv_transfer_params == want_report
    first, again = decisions.of_prompt[-2:]
    assert_same_decisions(first, want)
    assert_same_decisions(again, want)


@pytest.mark.parametrize("chunk", [64, 100, 255])
def test_chunk_size_changes_next_to_nothing(
    host: Engine, decisions: Decisions, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """vLLM's attention rounds otherwise in chunks of other sizes, ours then too.

    So what is compared is fp32, and tokens whose scores nearly tie may be swapped:
    at most one in a hundred of those kept.
    """
    want_tokens, want_report, want = once(host, decisions)
    monkeypatch.setattr(host.factory, "chunk_tokens", chunk)
    got_tokens, got_report, got = once(host, decisions)
    assert got_tokens == want_tokens
    assert got_report == want_report
    for mine, other in zip(got, want, strict=True):
        for a, b in zip(mine.kept.tolist(), other.kept.tolist(), strict=True):
            assert len(set(a) & set(b)) >= 0.99 * len(b)


# Faults in a pass, and memory.

PLACES = (
    "asl_vllm.prefill.factory.make_policy",
    "asl_vllm.selection.policies.base.window_scores",
    "asl_vllm.prefill.prompt.gather_kept",
    "asl_vllm.prefill.hidden.gather_tokens",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("injected"), RuntimeError("can't allocate memory")]
)
def test_lack_of_memory_in_a_pass_fails_that_request_only(
    host: Engine,
    alone: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    plain = add(host, "plain", TENANTS["plain"][0], max_tokens=TOKENS)
    with monkeypatch.context() as patched:
        patched.setattr(place, fail)
        failing = add(host, "failing", *TENANTS["pruned"][:1], budget=96)
        run_to_end(host, failing)
    assert failing.output.outputs[0].finish_reason == "error"
    run_to_end(host, plain)
    assert plain.tokens == alone["plain"]
    again = add(host, "again", TENANTS["pruned"][0], budget=96, max_tokens=TOKENS)
    run_to_end(host, again)
    assert again.tokens == alone["pruned"]


def test_no_request_allocates_beyond_the_reservation(host: Engine) -> None:
    """Prefill memory and pool are the same tensors before and after anything."""

    def addresses() -> list[tuple[int, int]]:
        tensors = [*prefill_memory(host).values(), *pool_memory(host)]
        return [(t.data_ptr(), t.untyped_storage().nbytes()) for t in tensors]

    before = addresses()
    buffers = host.factory.buffers
    reserved = buffers.device_bytes, buffers.host_bytes
    for num_tokens, budget in ((60, 48), (4000, 900), (1000, 10**15), (700, 1e-300)):
        request = add(
            host, "any", random_prompt(num_tokens, 30), budget=budget, max_tokens=2
        )
        run_to_end(host, request)
    with pytest.raises(VLLMValidationError):
        add(host, "long", random_prompt(5000, 31), budget=64)
    with pytest.raises(VLLMValidationError):
        add(host, "infinite", random_prompt(500, 31), budget=float("inf"))
    assert addresses() == before
    assert (buffers.device_bytes, buffers.host_bytes) == reserved


def test_a_lost_block_is_found_at_idle(host: Engine) -> None:
    """What ``check_integrity`` is for, in a whole engine."""
    (lost,) = host.pool.get_new_blocks(1)
    try:
        with pytest.raises(IntegrityError, match=f"block {lost.block_id} is lost"):
            request = add(host, "last", random_prompt(5 * BLOCK, 40), budget=64)
            run_to_end(host, request)
            drain(host)
    finally:
        host.pool.free_blocks([lost])
