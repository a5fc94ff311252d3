"""The engine end to end equals a plain-PyTorch run of the rule, in fp32."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from asl_vllm.selection.budget import resolve_kept
from tests.e2e.harness import BLOCK, Engine, engine
from tests.e2e.recording import record
from tests.oracle.asl import OracleResult, generate
from tests.oracle.model import TinyDecoder

WINDOW, L_MIN, L_OBS, TAU = 16, 2, 3, 0.6
MAX_TOKENS = 12
RULE = {"window": WINDOW, "pool_kernel": 7, "l_min": L_MIN, "l_obs": L_OBS, "tau": TAU}


@pytest.fixture(scope="module")
def running(random_model: Path) -> Iterator[Engine]:
    with engine(random_model, policy={"policy": "asl", **RULE}) as started:
        yield started


@pytest.fixture(scope="module")
def model(random_model: Path) -> TinyDecoder:
    return TinyDecoder.load(random_model)


def prompt(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 512) for _ in range(num_tokens)]


def expected(model: TinyDecoder, ids: list[int], budget: int | float) -> OracleResult:
    kept = resolve_kept(
        budget, num_prompt_tokens=len(ids), block_size=BLOCK, window=WINDOW
    )
    return generate(model, ids, kept=kept, max_tokens=MAX_TOKENS, **RULE)


def assert_same_selection(decisions: list, want: OracleResult) -> None:
    for layer, decision in enumerate(decisions):
        assert torch.equal(decision.kept, want.kept_per_layer[layer]), layer
    if want.selection_layer is None:
        assert decisions[-1].propagated is None
    else:
        assert len(decisions) == want.selection_layer + 1
        assert torch.equal(decisions[-1].propagated, want.propagated)


CASES = [(200, 64, 7), (333, 100, 8192), (777, 128, 256), (1025, 0.25, 300)]


@pytest.mark.parametrize(("num_tokens", "budget", "chunk"), CASES)
def test_equals_the_oracle(
    running: Engine,
    model: TinyDecoder,
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    budget: int | float,
    chunk: int,
) -> None:
    monkeypatch.setattr(running.factory, "chunk_tokens", chunk)
    decisions = record(monkeypatch, "asl")
    ids = prompt(num_tokens, seed=num_tokens)
    want = expected(model, ids, budget)
    (output,) = running.generate(
        [ids], budget=budget, max_tokens=MAX_TOKENS, ignore_eos=True
    )
    report = output.kv_transfer_params
    assert report["selection_layer"] == want.selection_layer
    assert report["kept_tokens"] == len(want.kept_per_layer[0][0])
    assert_same_selection(decisions.of_prompt[0], want)
    assert list(output.outputs[0].token_ids) == want.tokens


def test_the_rule_is_adaptive(running: Engine, model: TinyDecoder) -> None:
    """The cases above would be weak if the rule always took the same layer."""
    layers = {
        expected(model, prompt(n, seed=n), budget).selection_layer
        for n, budget, _ in CASES
    }
    assert layers - {None}


@pytest.mark.parametrize("chunk", [13, 31, 64, 500, 8192])
def test_chunks_do_not_change_the_result(
    running: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    ids = prompt(400, seed=5)
    decisions = record(monkeypatch, "asl")
    whole = running.generate([ids], budget=96, max_tokens=MAX_TOKENS, ignore_eos=True)
    monkeypatch.setattr(running.factory, "chunk_tokens", chunk)
    parts = running.generate([ids], budget=96, max_tokens=MAX_TOKENS, ignore_eos=True)
    first, second = decisions.of_prompt
    assert [d.kept.tolist() for d in first] == [d.kept.tolist() for d in second]
    assert whole[0].outputs[0].token_ids == parts[0].outputs[0].token_ids
    assert whole[0].kv_transfer_params == parts[0].kv_transfer_params


def test_batched_requests_answer_as_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt(n, seed=n) for n in (130, 470, 260, 611)]
    alone = [
        running.generate([p], budget=96, max_tokens=MAX_TOKENS, ignore_eos=True)[0]
        for p in prompts
    ]
    together = running.generate(
        prompts, budget=96, max_tokens=MAX_TOKENS, ignore_eos=True
    )
    for one, many in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids
        assert one.kv_transfer_params == many.kv_transfer_params
    assert running.free_blocks == running.start_free


def test_snapkv_never_selects(
    running: Engine, model: TinyDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler_side = running.scheduler.connector.scheduler_side
    config = dataclasses.replace(scheduler_side._config, policy="snapkv")
    monkeypatch.setattr(scheduler_side, "_config", config)
    ids = prompt(300, seed=9)
    want = generate(
        model, ids, kept=108, max_tokens=MAX_TOKENS, policy="snapkv", **RULE
    )
    (output,) = running.generate(
        [ids], budget=110, max_tokens=MAX_TOKENS, ignore_eos=True
    )
    assert output.kv_transfer_params["policy"] == "snapkv"
    assert output.kv_transfer_params["selection_layer"] is None
    assert output.kv_transfer_params["skipped_token_layers"] == 0
    assert list(output.outputs[0].token_ids) == want.tokens
