"""A pruned prompt over a cached prefix answers and keeps what it does from scratch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from asl_vllm.selection.policies import Keep
from asl_vllm_testing.harness import BLOCK, Engine, engine, random_prompt
from tests.e2e.recording import record

BUDGET = 128
WINDOW = 16
DOCUMENT = random_prompt(20 * BLOCK + 7, seed=1)
QUESTION, OTHER = random_prompt(40, seed=2), random_prompt(55, seed=3)
EXACT = ["snapkv", "gemfilter"]
"""Policies for which no token of the prefix goes through a layer again."""
POLICIES = ["asl", "snapkv", "fastkv", "gemfilter", "pyramidinfer"]
HIT = 20 * BLOCK


@pytest.fixture(scope="module")
def host(random_model: Path) -> Iterator[Engine]:
    with engine(
        random_model,
        policy={
            "policy": "asl",
            "window": WINDOW,
            "selection_layer": 2,
            "check_integrity": True,
        },
        max_num_batched_tokens=1024,
    ) as started:
        yield started


def ask(host: Engine, prompt: list[int], **options: Any) -> tuple[Any, int]:
    """Tokens with their log-probabilities, and cached tokens."""
    (reply,) = host.generate([prompt], logprobs=1, **options)
    return _told(reply)


def _told(reply: Any) -> tuple[Any, int]:
    (answer,) = reply.outputs
    chosen = [
        step[token].logprob
        for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    return (list(answer.token_ids), chosen), reply.num_cached_tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_to_scratch(
    host: Engine, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    host.llm.reset_prefix_cache()
    decisions = record(monkeypatch, policy)
    pruned = {"budget": BUDGET, "policy": policy}
    scratch, cached = ask(host, DOCUMENT + QUESTION, **pruned)
    assert cached == 0
    donor, _ = ask(host, DOCUMENT + OTHER)
    held = _checksums(host)
    again, cached = ask(host, DOCUMENT + QUESTION, **pruned)
    assert cached == HIT
    assert again == scratch if policy in EXACT else _close(again, scratch)
    assert ask(host, DOCUMENT + QUESTION, reuse="none", **pruned) == (scratch, 0)
    first, second, third = decisions.of_prompt
    assert len(first) == len(second) == len(third) > 0
    for mine, theirs in zip(first, second, strict=True):
        assert _same(mine.kept, theirs.kept)
        assert _same(mine.deeper, theirs.deeper)
    # What it read is still what it was, for third requests too.
    assert _checksums(host).items() >= held.items()
    same, cached = ask(host, DOCUMENT + OTHER)
    assert cached >= HIT
    assert same[0] == donor[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_questions_at_once_are_answered_as_alone(
    host: Engine, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Together where few of their tokens pass a layer: pyramidinfer drops too few."""
    host.llm.reset_prefix_cache()
    asked = [DOCUMENT + random_prompt(30 + 5 * i, seed=10 + i) for i in range(3)]
    pruned = {"budget": BUDGET, "policy": policy}
    alone = [ask(host, prompt, reuse="none", **pruned)[0] for prompt in asked]
    ask(host, DOCUMENT + OTHER)
    together: set[int] = set()
    load = host.factory.model.load_prefixes

    def counted(layer: int, blocks: Tensor, into: Any, *args: Any) -> None:
        together.add(len(into))
        load(layer, blocks, into, *args)

    monkeypatch.setattr(host.factory.model, "load_prefixes", counted)
    replies = host.generate(asked, logprobs=1, **pruned)
    assert together == {1 if policy == "pyramidinfer" else len(asked)}
    for reply, answer in zip(replies, alone, strict=True):
        found, cached = _told(reply)
        assert cached == HIT
        assert _close(found, answer)


@pytest.mark.parametrize("policy", ["asl", "snapkv"])
def test_a_fill_leaves_the_prefix_for_others(host: Engine, policy: str) -> None:
    """Answers are those of a prefix that a request without a budget left."""
    host.llm.reset_prefix_cache()
    pruned = {"budget": BUDGET, "policy": policy}
    ask(host, DOCUMENT + OTHER)
    read, cached = ask(host, DOCUMENT + QUESTION, **pruned)
    assert cached == HIT
    host.llm.reset_prefix_cache()
    (reply,) = host.generate([DOCUMENT + QUESTION], logprobs=1, reuse="fill", **pruned)
    filled, cached = _told(reply)
    told = reply.kv_transfer_params
    assert told["filled_tokens"] == told["reused_tokens"] >= HIT
    assert (filled, cached) == (read, 0) or _close(filled, read)
    # The prompt's own blocks up to its window, for anybody; not with another salt.
    again, cached = ask(host, DOCUMENT + QUESTION, reuse="fill", **pruned)
    assert cached == told["reused_tokens"]
    assert _close(again, filled)
    assert ask(host, DOCUMENT + OTHER)[1] >= HIT
    assert ask(host, DOCUMENT + OTHER, salt="other")[1] == 0


def _checksums(host: Engine) -> dict[int, str]:
    """Of what each block of the prefix cache holds in all layers."""
    layers = [attention.kv_cache for attention in host.factory.model._attentions]
    return {
        block.block_id: hashlib.sha256(
            b"".join(layer[block.block_id].numpy().tobytes() for layer in layers)
        ).hexdigest()
        for block in host.pool.blocks
        if block.block_hash is not None
    }


@pytest.mark.parametrize("policy", ["asl", "snapkv"])
def test_samples_share_one_prefill(
    host: Engine, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """And say what each would have said alone."""
    host.llm.reset_prefix_cache()
    prompt, pruned = DOCUMENT + QUESTION, {"budget": BUDGET, "policy": policy}
    decisions = record(monkeypatch, policy)
    alone = [
        ask(host, prompt, seed=seed, temperature=1, reuse="none", **pruned)[0]
        for seed in range(3)
    ]
    assert len(decisions.of_prompt) == 3
    decisions.clear()
    together = host.llm.generate(
        [{"prompt_token_ids": prompt}] * 3,
        [
            SamplingParams(
                temperature=1,
                seed=seed,
                max_tokens=8,
                logprobs=1,
                extra_args={"kv_budget": BUDGET, "kv_policy": policy},
            )
            for seed in range(3)
        ],
        use_tqdm=False,
    )
    assert len(decisions.of_prompt) == 1
    assert sorted(reply.num_cached_tokens for reply in together) == [
        *(0, len(prompt) - 1, len(prompt) - 1)
    ]
    for reply, (tokens, _) in zip(together, alone, strict=True):
        assert list(reply.outputs[0].token_ids) == tokens
    decisions.clear()
    sampled = {"n": 8, "temperature": 1, "seed": 0, **pruned}
    (shared,) = host.generate([prompt], **sampled)
    assert len(decisions.of_prompt) == 1
    (apart,) = host.generate([prompt], reuse="none", **sampled)
    assert len(decisions.of_prompt) == 1 + 8
    assert _texts(shared) == _texts(apart)


def _texts(reply: Any) -> list[list[int]]:
    return [list(output.token_ids) for output in reply.outputs]


def _close(one: Any, other: Any) -> bool:
    """Equal tokens; products of other numbers of rows may round otherwise."""
    return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-5)


def _same(one: Tensor | Keep, other: Tensor | Keep) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other


def test_the_same_prompt_again_is_computed_from_the_window_on(host: Engine) -> None:
    host.llm.reset_prefix_cache()
    prompt = DOCUMENT + QUESTION
    ask(host, prompt)
    cached = ask(host, prompt, budget=BUDGET)[1]
    assert cached == (len(prompt) - WINDOW) // BLOCK * BLOCK


def test_a_salt_shares_with_its_own_alone(host: Engine) -> None:
    host.llm.reset_prefix_cache()
    prompt = DOCUMENT + QUESTION
    ask(host, DOCUMENT + OTHER, salt="a")
    answers = {}
    for salt, hit in ((None, 0), ("b", 0), ("a", HIT)):
        answer, cached = ask(host, prompt, budget=BUDGET, salt=salt)
        assert cached == hit, salt
        answers[salt] = answer
    assert answers[None] == answers["b"]
    assert _close(answers["a"], answers[None])


def test_a_pruned_prompt_leaves_nothing_behind(host: Engine) -> None:
    host.llm.reset_prefix_cache()
    prompt = DOCUMENT + QUESTION
    ask(host, prompt, budget=BUDGET)
    assert ask(host, prompt)[1] == 0


def test_a_donor_that_arrives_in_the_same_step(host: Engine) -> None:
    """Its blocks are hashed when it is scheduled, and written before passes run."""
    host.llm.reset_prefix_cache()
    alone = ask(host, DOCUMENT + QUESTION, budget=BUDGET)[0]
    plain = SamplingParams(temperature=0, max_tokens=8)
    pruned = SamplingParams(
        temperature=0, max_tokens=8, extra_args={"kv_budget": BUDGET}
    )
    _, reply = host.llm.generate(
        [
            {"prompt_token_ids": DOCUMENT + OTHER},
            {"prompt_token_ids": DOCUMENT + QUESTION},
        ],
        [plain, pruned],
        use_tqdm=False,
    )
    assert reply.num_cached_tokens == HIT
    assert list(reply.outputs[0].token_ids) == alone[0]
