"""Blocks of pruned requests: held, freed, preempted, aborted, failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

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
from tests.e2e.recording import record_steps

POOL_TOKENS = 512
WINDOW = 16
LONG = 4 * POOL_TOKENS
LAYERS = 8
STEP_TOKENS = 256
SHARE = 0.5


@pytest.fixture(scope="module")
def small(random_model: Path) -> Iterator[Engine]:
    """An engine whose pool holds a quarter of the longest prompt."""
    with engine(
        random_model,
        policy={
            "policy": "asl",
            "window": WINDOW,
            "selection_layer": 2,
            "pass_share": SHARE,
        },
        pool_tokens=POOL_TOKENS,
        max_model_len=LONG + 256,
        max_num_batched_tokens=STEP_TOKENS,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def _whole_pool_after_each_test(small: Engine) -> Iterator[None]:
    yield
    drain(small)
    assert_pool_whole(small)


def alone(host: Engine, ids: list[int], **kw: Any) -> list[int]:
    request = add(host, "alone", ids, **kw)
    run_to_end(host, request)
    return request.tokens


def test_holds_kept_plus_generated(small: Engine) -> None:
    ids = random_prompt(900)
    request = add(small, "held", ids, budget=150, max_tokens=70)
    kept = 900 - 24 * BLOCK  # largest k <= 150 with whole blocks pruned
    seen = 0
    while not request.finished:
        step(small, request)
        if request.num_generated and not request.finished:
            # The newest token is written to the cache by the step after its own.
            need = -(-(kept + request.num_generated - 1) // BLOCK)
            assert need <= request.held_blocks <= need + 1
            assert small.free_blocks == small.start_free - request.held_blocks
            seen += 1
    assert seen > 60
    assert request.output.kv_transfer_params["kept_tokens"] == kept
    assert request.output.kv_transfer_params["freed_blocks"] == 24


def test_holds_only_kept_while_prefilling(small: Engine) -> None:
    request = add(small, "prefilling", random_prompt(LONG), budget=128, max_tokens=2)
    steps = 0
    while not request.num_generated:
        step(small, request)
        if request.request_id in small.scheduler.requests:
            assert request.held_blocks <= 128 // BLOCK + 1
        steps += 1
    # 2048 x 3 + 128 x 5 token-layers at half of 256 x 8 a step.
    assert steps >= 7
    run_to_end(small, request)


def test_prompt_longer_than_the_pool(small: Engine) -> None:
    ids = random_prompt(LONG, seed=3)
    (output,) = small.generate([ids], budget=256)
    assert len(output.outputs[0].token_ids) > 0
    assert output.kv_transfer_params["kept_tokens"] == 256
    with pytest.raises(VLLMValidationError, match="do not fit the KV pool of 512"):
        small.generate([ids])
    with pytest.raises(VLLMValidationError, match="kv_budget of 48 to 512"):
        small.generate([ids], budget=1024)


def test_output_longer_than_the_pool(small: Engine) -> None:
    """Would otherwise preempt itself for ever."""
    with pytest.raises(VLLMValidationError, match="Lower max_tokens to 213"):
        small.generate([random_prompt(300)], max_tokens=400)
    (output,) = small.generate(
        [random_prompt(300)], max_tokens=LONG + 256 - 300, ignore_eos=True
    )
    assert len(output.outputs[0].token_ids) == 213
    assert output.outputs[0].finish_reason == "length"


def test_preemption_keeps_the_answer(small: Engine) -> None:
    """Two requests whose outputs together outgrow the pool."""
    prompts = [random_prompt(600, seed=1), random_prompt(640, seed=2)]
    want = [alone(small, p, budget=128, max_tokens=180) for p in prompts]
    pair = [
        add(small, f"pair{i}", p, budget=128, max_tokens=180)
        for i, p in enumerate(prompts)
    ]
    preempted = 0
    while not all(r.finished for r in pair):
        step(small, *pair)
        live = small.scheduler.requests.values()
        preempted = max([preempted, *(r.num_preemptions for r in live)])
    assert preempted > 0
    assert [r.tokens for r in pair] == want


def test_abort_in_the_middle_of_a_prefill(small: Engine) -> None:
    ids, other = random_prompt(LONG, seed=4), random_prompt(500, seed=5)
    want = alone(small, other, budget=96)
    doomed = add(small, "doomed", ids, budget=128)
    behind = add(small, "behind", other, budget=96)
    for _ in range(3):
        step(small, doomed, behind)
    assert len(small.queue) >= 1
    assert small.queue._running.progress.layer < 8
    small.llm.llm_engine.abort_request([doomed.request_id], internal=True)
    run_to_end(small, behind)
    assert behind.tokens == want
    drain(small)
    assert len(small.queue) == 0


def test_abort_while_decoding(small: Engine) -> None:
    request = add(small, "decoding", random_prompt(500), budget=96, max_tokens=100)
    while request.num_generated < 5:
        step(small, request)
    small.llm.llm_engine.abort_request([request.request_id], internal=True)


def fail_at(monkeypatch: pytest.MonkeyPatch, model: Any, layer: int) -> None:
    original = model.run_layer

    def run_layer(number: int, *args: Any) -> None:
        if number == layer:
            raise RuntimeError("injected")
        original(number, *args)

    monkeypatch.setattr(model, "run_layer", run_layer)


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_error_in_a_pass_fails_that_request_only(
    small: Engine, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    plain, pruned = random_prompt(300, seed=6), random_prompt(500, seed=7)
    want_plain = alone(small, plain)
    want_pruned = alone(small, pruned, budget=96)
    bystander = add(small, "bystander", plain)
    with monkeypatch.context() as patched:
        fail_at(patched, small.factory.model, layer)
        failing = add(small, "failing", pruned, budget=96)
        run_to_end(small, failing, bystander)
    assert failing.output.outputs[0].finish_reason == "error"
    assert failing.tokens == []
    assert bystander.tokens == want_plain
    assert alone(small, pruned, budget=96) == want_pruned


def test_scores_that_are_not_finite_fail_the_request(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            small.factory.model,
            "sum_over_ranks",
            lambda score: torch.full_like(score, float("nan")),
        )
        failing = add(small, "nan", random_prompt(500), budget=96)
        run_to_end(small, failing)
    assert failing.output.outputs[0].finish_reason == "error"
    assert alone(small, random_prompt(500), budget=96)


def test_neighbours_decode_while_a_prompt_is_pruned(small: Engine) -> None:
    neighbour = add(small, "neighbour", random_prompt(100, seed=8), max_tokens=60)
    while neighbour.num_generated < 2:
        step(small, neighbour)
    long = add(small, "long", random_prompt(LONG, seed=9), budget=128)
    before = neighbour.num_generated
    while not long.num_generated:
        step(small, neighbour, long)
    assert neighbour.num_generated - before >= 4, "one token a step of the prefill"
    run_to_end(small, neighbour, long)


def test_each_step_keeps_to_its_bounds_while_others_decode(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is more work than one of stock prefill, and passes have their share."""
    pair = [
        add(small, f"pair{i}", random_prompt(60, seed=30 + i), max_tokens=60)
        for i in (0, 1)
    ]
    while not all(request.num_generated for request in pair):
        step(small, *pair)
    steps = record_steps(monkeypatch, small)
    pruned = [
        add(small, f"long{i}", random_prompt(n, seed=32 + i), budget=96, max_tokens=1)
        for i, n in enumerate((LONG, 700, 130))
    ]
    order: list[Running] = []
    while len(order) < len(pruned):
        before = [request.num_generated for request in pair]
        step(small, *pair, *pruned)
        order += [r for r in pruned if r.finished and r not in order]
        assert all(a.num_generated > b for a, b in zip(pair, before, strict=True))
    assert order == pruned
    for work in steps:
        assert sum(work.passes) <= SHARE * STEP_TOKENS * LAYERS
        assert work.scheduled_tokens * LAYERS + sum(work.passes) <= STEP_TOKENS * LAYERS
    busy = [work for work in steps if work.passes]
    assert all(work.scheduled_tokens >= 2 for work in busy), "the pair decodes"
    # A step that may run four passes of 256 tokens does.
    assert max(sum(work.passes) for work in busy) == SHARE * STEP_TOKENS * LAYERS
    run_to_end(small, *pair)


def test_pruned_requests_stay_out_of_the_prefix_cache(small: Engine) -> None:
    ids = random_prompt(320, seed=10)
    want = alone(small, ids)
    for budget in (96, None, 128, None):
        request = add(small, f"mixed{budget}", ids, budget=budget)
        run_to_end(small, request)
        cached = request.output.num_cached_tokens
        if budget is None:
            assert cached > 0, "an unpruned request still hits the cache"
            assert request.tokens == want


def test_first_come_first_served(small: Engine) -> None:
    """A short prompt does not overtake a long one that came before it."""
    requests = [
        add(small, f"fcfs{i}", random_prompt(n, seed=20 + i), budget=64, max_tokens=1)
        for i, n in enumerate((LONG, 100, 1500, 120, 800))
    ]
    order: list[Running] = []
    while len(order) < len(requests):
        step(small, *requests)
        order += [r for r in requests if r.finished and r not in order]
    assert order == requests
