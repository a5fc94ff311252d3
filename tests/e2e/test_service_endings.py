"""However a request ends, its reply, headers, usage and the metrics tell the same.

The table's endings are those of one sequence; further below are those of several, of
clients that go away, of requests under one id, and of the smallest budget.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from asl_vllm.config import POLICY_NAMES
from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import MODEL_NAME, Server
from tests.e2e.prometheus import Samples, scrape, settle, since
from tests.e2e.replies import (
    BUDGET,
    CHAT,
    COMPLETIONS,
    KEPT,
    MESSAGES,
    PATHS,
    QUESTION,
    REPORT,
    answer,
    as_headers,
    body,
    for_chat,
    kv_headers,
    numbers,
    stats,
)

WORD = QUESTION.answer_words[2]
assert WORD not in QUESTION.answer_words[:2]
SHORT_BUDGET = 40
"""The smallest that these servers allow: the window and a block."""


def ended(server: Server, before: Samples) -> Samples:
    """How requests ended since."""
    changes = since(server.http, before)
    return {k: v for k, v in changes.items() if k[0] == "requests_total"}


def endings(server: Server, path: str) -> dict[str, dict[str, Any]]:
    """What is sent for each way to end that the API has."""
    word = {"stop_sequences" if path == MESSAGES else "stop": [WORD]}
    if path == MESSAGES:
        return {"length": {}, "stop string": word}
    tokens = server.post("/tokenize", prompt=WORD, add_special_tokens=False).json()
    assert len(tokens["tokens"]) == 1
    return {
        "length": {},
        "stop string": word,
        "stop token": {"stop_token_ids": tokens["tokens"]},
    }


@pytest.mark.parametrize("path", [*PATHS, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
def test_every_ending_tells_the_same(pruning: Server, path: str, stream: bool) -> None:
    """Text and reason are those of the request without a budget."""
    streamed: dict[str, Any] = {"stream": True} if stream else {}
    if stream and path in (COMPLETIONS, CHAT):
        streamed |= {"stream_options": {"include_usage": True}}
    expected = for_chat(REPORT, path)
    before = scrape(pruning.http)
    ways = endings(pruning, path)
    for name, fields in ways.items():
        plain, pruned = (
            pruning.post(path, **body(path, **fields, **streamed, **more))
            for more in ({}, {"kv_budget": BUDGET})
        )
        mine, theirs = answer(path, pruned), answer(path, plain)
        assert (mine.text, mine.ended) == (theirs.text, theirs.ended), name
        words = 4 if name == "length" else 2
        assert mine.words == QUESTION.answer_words[:words], name
        assert mine.usage.pop("kv_cache") == numbers(expected), name
        for said in (mine, theirs):
            said.usage.pop("input_tokens_details", None)
        assert mine.usage == theirs.usage, name
        assert kv_headers(plain) == {}, name
        assert kv_headers(pruned) == ({} if stream else as_headers(expected)), name
        # Of streams vLLM has them since 0.33.
        assert all(told == expected for told in mine.told), name
        assert theirs.told == [], name
        if not stream and path != MESSAGES:
            assert len(mine.told) == 1, name
    settle(
        lambda: ended(pruning, before), {("requests_total", "pruned", "asl"): len(ways)}
    )


def test_choices_that_end_in_different_ways(pruning: Server) -> None:
    """Two choices of each of two prompts, of which one comes to the stop string."""
    others = (needle(seed, 600) for seed in range(50, 99))
    other = next(prompt for prompt in others if WORD not in prompt.answer_words)
    before = scrape(pruning.http)
    asked = body(COMPLETIONS, kv_budget=BUDGET, n=2, top_k=1, stop=[WORD])
    asked |= {"prompt": [QUESTION.text, other.text], "temperature": 1}
    reply = pruning.post(COMPLETIONS, **asked)
    assert reply.status_code == 200, reply.text
    choices = reply.json()["choices"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == ["stop", "stop", "length", "length"]
    words = [QUESTION.answer_words[:2]] * 2 + [other.answer_words] * 2
    assert [choice["text"].split() for choice in choices] == words
    usage = reply.json()["usage"]["kv_cache"]
    assert usage == {k: 4 * v for k, v in numbers(REPORT).items()} | {
        "selection_layer": REPORT["selection_layer"]
    }
    assert reply.headers["x-kv-kept-tokens"] == str(4 * KEPT)
    assert reply.json()["kv_transfer_params"] == REPORT
    settle(lambda: ended(pruning, before), {("requests_total", "pruned", "asl"): 4})


def test_an_abandoned_request_is_counted_as_aborted(pruning: Server) -> None:
    before = scrape(pruning.http)
    asked = body(COMPLETIONS, needle(31, 3000).text, kv_budget=BUDGET, stream=True)
    asked |= {"model": MODEL_NAME, "max_tokens": 512, "ignore_eos": True}
    with (
        pruning.connect() as client,
        client.stream("POST", COMPLETIONS, json=asked) as reply,
    ):
        next(reply.iter_lines())
    settle(lambda: ended(pruning, before), {("requests_total", "aborted", "asl"): 1.0})
    assert stats(pruning.http)["engines"][0]["requests"] == []


def test_two_at_once_under_one_id(pruning: Server) -> None:
    """Of different budgets: each reply has its own proof."""
    question = needle(42, 2001)
    asked = body(COMPLETIONS, question.text, ignore_eos=True) | {"max_tokens": 48}

    def ask(budget: int) -> httpx.Response:
        with pruning.connect() as client:
            sent = {**asked, "model": MODEL_NAME, "kv_budget": budget}
            return client.post(COMPLETIONS, json=sent, headers={"x-request-id": "job"})

    with ThreadPoolExecutor(2) as pool:
        replies = pool.map(ask, (128, 512))
        deadline = time.monotonic() + 60
        while len(stats(pruning.http)["engines"][0]["requests"]) < 2:
            assert time.monotonic() < deadline, "they were never there together"
            time.sleep(0.01)
    for reply, kept in zip(replies, (113, 497), strict=True):
        told = answer(COMPLETIONS, reply)
        assert told.words[:4] == question.answer_words
        assert told.usage["kv_cache"]["kept_tokens"] == kept
        assert reply.headers["x-kv-kept-tokens"] == str(kept)


@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name != "none"])
def test_the_smallest_budget(pruning: Server, policy: str) -> None:
    """Which may leave room for a single token beside the window, with any policy."""
    lengths = {361: 9, 364: 12, 384: 32, 392: 40}
    fields = {"kv_budget": SHORT_BUDGET, "kv_policy": policy}
    asked = body(COMPLETIONS, **fields) | {
        "prompt": [needle(43, tokens).text for tokens in lengths]
    }
    reply = pruning.post(COMPLETIONS, **asked)
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    assert usage["kv_cache"]["kept_tokens"] == sum(lengths.values())
    assert usage["kv_cache"]["pruned_tokens"] == 352 * len(lengths)
    assert usage["completion_tokens"] == 4 * len(lengths)
    assert reply.json()["kv_transfer_params"]["kept_tokens"] == lengths[361]
    assert reply.json()["kv_transfer_params"]["policy"] == policy
