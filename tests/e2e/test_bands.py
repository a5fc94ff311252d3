"""Full shallow layers: KV-cache groups of vLLM in which only deep layers are pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from asl_vllm.prefill import Bands
from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.harness import (
    BLOCK,
    Engine,
    add,
    assert_pool_whole,
    drain,
    engine,
    run_to_end,
    step,
)
from asl_vllm_testing.oracle.asl import OracleResult, generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import key_value, needle

LAYERS, BANDS = 10, 5
RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
POOL_BLOCKS = 32
"""A band; a prompt of 700 tokens takes 22."""
BUDGET = 128


@pytest.fixture(scope="module")
def banded() -> Iterator[Engine]:
    with engine(
        policy={"policy": "asl", "bands": BANDS, **RULE},
        num_gpu_blocks_override=POOL_BLOCKS * BANDS + 1,
        max_num_batched_tokens=256,
    ) as started:
        yield started


@pytest.fixture(scope="module")
def model() -> TinyDecoder:
    return TinyDecoder.load(TINY_MODEL)


@pytest.fixture(autouse=True)
def _whole_pool_after_each_test(banded: Engine) -> Iterator[None]:
    yield
    drain(banded)
    assert_pool_whole(banded)


def fix_layer(
    monkeypatch: pytest.MonkeyPatch, host: Engine, selection_layer: int | None
) -> None:
    config = dataclasses.replace(host.factory.config, selection_layer=selection_layer)
    monkeypatch.setattr(host.factory, "config", config)


def expected(
    model: TinyDecoder, ids: list[int], full: bool = True, **kw: Any
) -> OracleResult:
    kept = resolve_kept(BUDGET, num_prompt_tokens=len(ids), block_size=BLOCK, window=8)
    bands = BANDS if full else None
    return generate(model, ids, kept=kept, full_bands=bands, **{**RULE, **kw})


def held(host: Engine, request_id: str) -> list[int]:
    """Blocks that a request holds in each band."""
    bands = host.scheduler.kv_cache_manager.get_block_ids(request_id)
    return [sum(block != 0 for block in ids) for ids in bands]


@pytest.mark.parametrize("selection_layer", [0, 3, 4, 7, 8, 9])
def test_answers_equal_the_oracles_and_blocks_the_arithmetic(
    banded: Engine,
    model: TinyDecoder,
    monkeypatch: pytest.MonkeyPatch,
    selection_layer: int,
) -> None:
    ids = key_value(selection_layer, 515).token_ids
    fix_layer(monkeypatch, banded, selection_layer)
    want = expected(model, ids, max_tokens=40, selection_layer=selection_layer)
    request = add(
        banded, "full", ids, budget=BUDGET, max_tokens=40, kv_shallow="full"
    )  # fmt: skip
    deep = Bands(LAYERS, BANDS).below(selection_layer)
    freed = (515 - BUDGET + BLOCK - 1) // BLOCK
    while not request.finished:
        step(banded, request)
        if request.num_generated and not request.finished:
            counts = held(banded, request.request_id)
            blocks = counts[0]
            cached = len(ids) + request.num_generated - 1
            assert cached <= blocks * BLOCK <= cached + BLOCK
            assert counts == [blocks] * (BANDS - deep) + [blocks - freed] * deep
            assert banded.free_blocks == banded.start_free - sum(counts)
    assert request.tokens == want.tokens
    reply = request.output.kv_transfer_params
    assert reply["selection_layer"] == selection_layer
    assert reply["freed_blocks"] == freed * deep
    assert reply["skipped_token_layers"] == freed * BLOCK * deep * LAYERS // BANDS


@pytest.mark.parametrize(
    "prompt", [key_value(1, 700), key_value(2, 333), needle(3, 600)], ids=str
)
def test_the_adaptive_rule(banded: Engine, model: TinyDecoder, prompt: Any) -> None:
    """The selection layer and its tokens are those of pruned shallow layers."""
    ids = prompt.token_ids
    want = expected(model, ids, max_tokens=8)
    plain = expected(model, ids, full=False, max_tokens=8)
    assert want.selection_layer == plain.selection_layer
    requests = [
        add(banded, f"{mode}", ids, budget=BUDGET, max_tokens=8, kv_shallow=mode)
        for mode in ("full", "snapkv")
    ]
    run_to_end(banded, *requests)
    for request, truth in zip(requests, (want, plain), strict=True):
        assert request.tokens == truth.tokens
        reply = request.output.kv_transfer_params
        assert reply["selection_layer"] == truth.selection_layer


def test_no_selection_prunes_nothing(
    banded: Engine, model: TinyDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(banded.factory.config, tau=0.0)
    monkeypatch.setattr(banded.factory, "config", config)
    ids = key_value(5, 300).token_ids
    unpruned = generate(model, ids, kept=None, max_tokens=8, **RULE)
    request = add(banded, "none", ids, budget=BUDGET, kv_shallow="full")
    run_to_end(banded, request)
    assert request.tokens == unpruned.tokens
    reply = request.output.kv_transfer_params
    assert (reply["pruned_tokens"], reply["freed_blocks"]) == (0, 0)
    assert reply["selection_layer"] is None


def test_requests_without_a_budget_answer_as_without_bands(
    banded: Engine, model: TinyDecoder
) -> None:
    ids = key_value(6, 400).token_ids
    want = generate(model, ids, kept=None, max_tokens=8, **RULE)
    first = add(banded, "first", ids)
    run_to_end(banded, first)
    again = add(banded, "again", ids)
    run_to_end(banded, again)
    assert first.tokens == again.tokens == want.tokens
    assert again.output.num_cached_tokens == 384, "the prefix cache works in bands"


@pytest.mark.parametrize("shallow", ["full", "snapkv"])
def test_a_cached_prefix_is_read_in_each_band(
    banded: Engine, model: TinyDecoder, shallow: str
) -> None:
    ids = key_value(9, 515).token_ids
    banded.llm.reset_prefix_cache()
    donor = add(banded, "donor", [*ids[: 15 * BLOCK], *ids[:9]], max_tokens=1)
    run_to_end(banded, donor)
    request = add(banded, "read", ids, budget=BUDGET, kv_shallow=shallow)
    run_to_end(banded, request)
    want = expected(model, ids, full=shallow == "full", max_tokens=8)
    assert request.tokens == want.tokens
    reply = request.output.kv_transfer_params
    assert reply["selection_layer"] == want.selection_layer
    assert reply["reused_tokens"] == request.output.num_cached_tokens == 15 * BLOCK


def test_preemption_keeps_the_answer(banded: Engine) -> None:
    """Two prompts that fit the pool once pruned, and whose answers do not."""
    prompts = [key_value(seed, n).token_ids for seed, n in ((7, 500), (8, 470))]
    options = {"budget": BUDGET, "max_tokens": 190, "kv_shallow": "full"}
    want = []
    for ids in prompts:
        alone = add(banded, "alone", ids, **options)
        run_to_end(banded, alone)
        want.append(alone.tokens)
    pair = [add(banded, f"pair{i}", ids, **options) for i, ids in enumerate(prompts)]
    preempted = 0
    while not all(request.finished for request in pair):
        step(banded, *pair)
        live = banded.scheduler.requests.values()
        preempted = max([preempted, *(r.num_preemptions for r in live)])
    assert preempted > 0
    assert [request.tokens for request in pair] == want


def test_abort_in_the_middle_of_a_prefill(banded: Engine) -> None:
    doomed = add(
        banded, "doomed", key_value(9, 900).token_ids, budget=BUDGET, kv_shallow="full"
    )
    for _ in range(2):
        step(banded, doomed)
    assert len(banded.queue) == 1
    assert held(banded, doomed.request_id) == [29] * BANDS
    banded.llm.llm_engine.abort_request([doomed.request_id], internal=True)
