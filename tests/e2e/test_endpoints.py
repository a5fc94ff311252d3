"""Every endpoint that generates: fields are read, refused when wrong, and proved.

The server has a default budget and a length from the generation config, of which the
clients know nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import MODEL_NAME, Server, serve
from asl_vllm_testing.settings import BLOCK, POOL_TOKENS, SERVER_OPTIONS
from tests.e2e.prometheus import Samples, scrape, settle, since
from tests.e2e.replies import answer, events

QUESTION = needle(7, 600)
MESSAGE = {"role": "user", "content": f"<s> {QUESTION.text}"}
ANSWER = QUESTION.answer_words
PRUNED = 480
BATCH, MESSAGES, RESPONSES = (
    "/v1/chat/completions/batch",
    "/v1/messages",
    "/v1/responses",
)
TOKENS = "/inference/v1/generate"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LENGTH = 300
DEFAULTS = (
    *("--kv-budget", "0.25"),
    *("--override-generation-config", json.dumps({"max_new_tokens": LENGTH})),
)
FIGURES = ("--enable-prompt-tokens-details", "--enable-per-request-metrics")
COUNT, SECONDS = ("prefill_seconds_count",), ("prefill_seconds_sum",)
LONG = needle(8, 900)
"""Together with so many tokens it does not fit the pool, unless it is pruned."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    env = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    options = (*SERVER_OPTIONS, *DEFAULTS, *FIGURES, "--enable-scale-out")
    with serve(log, *options, **env) as started:
        yield started


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return server.post(path, **{"temperature": 0, "max_tokens": 4, **body})


def batch(server: Server, **fields: Any) -> httpx.Response:
    short = [{"role": "user", "content": "the sky is"}]
    return post(server, BATCH, messages=[[MESSAGE], short], **fields)


def message(server: Server, **fields: Any) -> httpx.Response:
    return post(server, MESSAGES, messages=[MESSAGE], **fields)


def tokens(server: Server, extra: dict[str, Any], **fields: Any) -> httpx.Response:
    parameters = {"temperature": 0, "max_tokens": 4, "extra_args": extra}
    body = {"token_ids": QUESTION.token_ids, "sampling_params": parameters, **fields}
    return server.http.post(TOKENS, json=body)


@pytest.mark.parametrize("words", [4, 2])
def test_a_batch_of_conversations(server: Server, words: int) -> None:
    """Also where a stop string ends some.

    vLLM streams none: told to, it gives a body with the end of each text only.
    """
    stop = [ANSWER[2]] if words == 2 else []
    for more in ({}, {"stream": True}):
        reply = batch(server, kv_budget=128, stop=stop, **more)
        assert reply.status_code == 200, reply.text
        usage = reply.json()["usage"]["kv_cache"]
        assert (usage["pruned_tokens"], usage["budget_tokens"]) == (PRUNED, 2 * 128)
        assert reply.headers["x-kv-pruned-tokens"] == str(PRUNED)
        first, _ = reply.json()["choices"]
        if not more:
            assert first["message"]["content"].split() == ANSWER[:words]
        assert first["finish_reason"] == ("stop" if stop else "length")
        assert batch(server, kv_budget=3, **more).status_code == 400


@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_a_message(server: Server, place: str) -> None:
    fields: dict[str, Any] = {"kv_budget": 128}
    reply = message(server, **fields if place == "body" else {place: fields})
    assert reply.status_code == 200, reply.text
    assert reply.json()["content"][0]["text"].split() == ANSWER
    assert reply.json()["usage"]["kv_cache"]["pruned_tokens"] == PRUNED
    assert reply.headers["x-kv-pruned-tokens"] == str(PRUNED)


def test_a_streamed_message(server: Server) -> None:
    reply = message(server, kv_budget=128, stream=True)
    events = [
        json.loads(line.removeprefix("data: "))
        for line in reply.text.splitlines()
        if line.startswith("data: {")
    ]
    begin = next(event for event in events if event["type"] == "message_start")
    assert "kv_cache" not in begin["message"]["usage"]
    end = next(event for event in events if event["type"] == "message_delta")
    assert end["usage"]["kv_cache"]["pruned_tokens"] == PRUNED


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_message_is_refused_in_its_own_form(server: Server, stream: bool) -> None:
    for fields in ({"kv_budget": 3}, {"vllm_xargs": {"kv_budget": 3}}):
        reply = message(server, stream=stream, **fields)
        assert reply.status_code == 400, reply.text
        assert reply.json()["type"] == "error"
        assert "kv_budget" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_that_does_not_fit(server: Server, stream: bool) -> None:
    """Refused in their form, before a stream begins; pruned it is answered."""
    long = {"role": "user", "content": needle(14, 2 * POOL_TOKENS).text}
    asked = {"messages": [long], "stream": stream}
    reply = post(server, MESSAGES, **asked, kv_policy="none")
    assert reply.status_code == 400, reply.text
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "BadRequestError", "vLLM's word for it"
    assert "do not fit the KV pool" in reply.json()["error"]["message"]
    if not stream:
        assert post(server, MESSAGES, **asked).status_code == 200


def test_a_background_response_is_stored_with_its_proof(server: Server) -> None:
    asked = {"model": MODEL_NAME, "input": MESSAGE["content"], "temperature": 0}
    reply = server.http.post(
        RESPONSES, json={**asked, "kv_budget": 128, "background": True, "store": True}
    )
    assert reply.status_code == 200, reply.text
    deadline = time.monotonic() + 60
    while (stored := reply.json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        reply = server.http.get(f"{RESPONSES}/{stored['id']}")
    assert stored["usage"]["kv_cache"]["pruned_tokens"] == PRUNED
    reply = server.http.post(
        RESPONSES, json={**asked, "kv_budget": 3, "background": True, "store": True}
    )
    assert reply.status_code == 400, reply.text


def test_token_ids(server: Server) -> None:
    reply = tokens(server, {"kv_budget": 128})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["token_ids"] == QUESTION.answer_ids
    assert reply.json()["kv_transfer_params"]["pruned_tokens"] == PRUNED
    assert reply.headers["x-kv-pruned-tokens"] == str(PRUNED)
    for extra, fields in (({"kv_budget": 3}, {}), ({}, {"kv_budget": 128})):
        reply = tokens(server, extra, **fields)
        assert reply.status_code == 400, reply.text
        assert "kv_budget" in reply.text


def test_a_rendered_request_hands_its_fields_on(server: Server) -> None:
    reply = post(server, "/v1/completions/render", prompt=QUESTION.text, kv_budget=128)
    assert reply.status_code == 200, reply.text
    (rendered,) = reply.json()
    assert rendered["sampling_params"]["extra_args"]["kv_budget"] == 128
    answer = server.http.post(TOKENS, json=rendered)
    assert answer.json()["kv_transfer_params"]["pruned_tokens"] == PRUNED
    reply = post(server, "/v1/chat/completions/render", messages=[MESSAGE], kv_budget=3)
    assert reply.status_code == 400, reply.text


def test_endpoints_that_read_no_field_refuse_them(server: Server) -> None:
    scoring = {"query": "the sky", "items": ["is"], "label_token_ids": [5, 6]}
    for path, body in (
        ("/generative_scoring", scoring),
        (BATCH, {"messages": [[MESSAGE]], "kv_budget": 3}),
    ):
        reply = server.post(path, **{"kv_budget": 128, **body})
        assert reply.status_code == 400, reply.text
        assert "kv_budget" in reply.text
    assert server.post("/generative_scoring", **scoring).status_code == 200


def test_the_default_budget_holds_for_all(server: Server) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": QUESTION.text}),
        (CHAT, {"messages": [MESSAGE]}),
        (MESSAGES, {"messages": [MESSAGE]}),
    ):
        reply = post(server, path, **body)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-kv-pruned-tokens"] == str(PRUNED), path
        reply = post(server, path, **body, vllm_xargs={"kv_policy": "none"})
        assert "x-kv-pruned-tokens" not in reply.headers, path


@pytest.mark.parametrize(
    "scoring",
    [
        {"echo": True, "logprobs": 1, "max_tokens": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"prompt_logprobs": 1},
    ],
    ids=["echo", "echo alone", "prompt_logprobs"],
)
def test_log_likelihoods_are_of_the_whole_prompt(
    server: Server, scoring: dict[str, Any]
) -> None:
    """As evaluation harnesses ask for them; the default budget gives way."""
    asked = {"prompt": [QUESTION.token_ids, needle(9, 300).token_ids], **scoring}
    replies = [
        post(server, COMPLETIONS, **asked, **more)
        for more in ({}, {"kv_policy": "none"})
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert "kv_cache" not in reply.json()["usage"]
        assert not [name for name in reply.headers if name.startswith("x-kv")]
    mine, theirs = (reply.json() for reply in replies)
    assert mine["choices"] == theirs["choices"]
    # vLLM counts a token for each prompt where none was asked for.
    assert mine["usage"] == theirs["usage"]
    assert mine["usage"]["prompt_tokens"] == 900
    found = mine["choices"][0]
    if "echo" in scoring:
        assert found["text"].startswith(f"<s> {QUESTION.text}")
        found = found["logprobs"]["token_logprobs"]
        assert len(found) == 600 + scoring["max_tokens"]
    else:
        found = found["prompt_logprobs"]
        assert len(found) == 600
    assert found[0] is None and None not in found[1:]
    refused = post(server, COMPLETIONS, **asked, kv_budget=128)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "kv_budget"
    assert "prompt_logprobs" in refused.json()["error"]["message"]


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("fields", [{}, {"kv_budget": 128}], ids=["default", "own"])
def test_an_echo_without_logprobs_is_pruned(
    server: Server, length: int, fields: dict[str, Any]
) -> None:
    """What is repeated is the text; of prompts within the budget too."""
    asked = {"echo": True, "max_tokens": length, "prompt": QUESTION.text, **fields}
    mine = post(server, COMPLETIONS, **asked)
    theirs = post(server, COMPLETIONS, **{**asked, "kv_budget": 1.0}).json()
    assert mine.status_code == 200, mine.text
    text, usage = mine.json()["choices"][0]["text"], mine.json()["usage"]
    assert text == theirs["choices"][0]["text"]
    assert text.removeprefix("<s> ").split()[:599] == QUESTION.text.split()
    assert usage["completion_tokens"] == theirs["usage"]["completion_tokens"]
    assert usage["kv_cache"]["pruned_tokens"] == PRUNED
    assert usage["kv_cache"]["kept_tokens"] == 600 - PRUNED


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_a_length_that_nobody_sent_is_lowered(server: Server, path: str) -> None:
    """The generation config's, and the 16 tokens of /v1/completions."""
    text = LONG.text if path != COMPLETIONS else needle(8, POOL_TOKENS - 7).text
    name = {CHAT: "messages", RESPONSES: "input"}.get(path, "prompt")
    body = {name: [{"role": "user", "content": text}] if path == CHAT else text}
    ends = {} if path == RESPONSES else {"ignore_eos": True}
    reply = server.post(path, **body, **ends, temperature=0, kv_policy="none")
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    if ends:
        # The last one is never written to the cache.
        assert usage["total_tokens"] == POOL_TOKENS + 1
    # What is pruned leaves room for all of it.
    reply = server.post(path, **body, **ends, temperature=0, kv_budget=128)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["kv_cache"]["pruned_tokens"] > 700
    if ends:
        length = 16 if path == COMPLETIONS else LENGTH
        assert reply.json()["usage"]["completion_tokens"] == length
    field = "max_output_tokens" if path == RESPONSES else "max_tokens"
    reply = server.post(path, **body, kv_policy="none", **{field: LENGTH - 1})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field


def test_cached_tokens_are_those_that_were_read(server: Server) -> None:
    """Of the prefix cache, whatever vLLM takes a pruned prompt's tokens for."""
    asked = {"prompt": needle(15, 600).text}
    whole = 600 // BLOCK * BLOCK
    for fields, cached in (
        ({"kv_budget": 128}, 0),
        ({"kv_budget": 128}, 0),
        ({"kv_policy": "none"}, 0),
        ({"kv_policy": "none"}, whole),
        ({"kv_budget": 128}, 0),
        ({"kv_budget": 128, "kv_reuse": "read"}, whole),
    ):
        usage = post(server, COMPLETIONS, **asked, **fields).json()["usage"]
        assert usage["prompt_tokens"] == 600
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached, fields
        if "kv_reuse" in fields:
            assert usage["kv_cache"]["reused_tokens"] == cached


@pytest.mark.parametrize("stream", [False, True])
def test_a_messages_tokens_add_up(server: Server, stream: bool) -> None:
    """What was read and what went to the prefix cache, which is none of a pruned's."""
    text = needle(16 + stream, 600).text
    asked = {"messages": [{"role": "user", "content": f"<s> {text}"}]}
    whole = 600 // BLOCK * BLOCK
    for fields, read, written in (
        ({}, 0, 0),
        ({"kv_policy": "none"}, 0, whole),
        ({"kv_policy": "none"}, whole, 0),
        ({"kv_reuse": "read"}, whole, 0),
    ):
        reply = post(server, MESSAGES, **asked, **fields, stream=stream)
        usage = answer(MESSAGES, reply).usage
        assert usage["cache_read_input_tokens"] == read, fields
        assert usage["cache_creation_input_tokens"] == written, fields
        assert usage["input_tokens"] == 600 - read - written, fields


@pytest.mark.parametrize(("path", "stream"), [(COMPLETIONS, False), (CHAT, True)])
def test_a_replys_times_make_the_wall_time(
    server: Server, path: str, stream: bool
) -> None:
    """The prefill is in the time to the first token, not in the queue's."""
    text = needle(18 + stream, 3000).text
    name = "messages" if path == CHAT else "prompt"
    asked = {name: [{"role": "user", "content": text}] if path == CHAT else text}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    before = scrape(server.http)
    began = time.monotonic()
    reply = post(server, path, **asked, kv_budget=128, **streamed if stream else {})
    wall = 1000 * (time.monotonic() - began)
    assert reply.status_code == 200, reply.text
    took = (events(reply.text)[-1] if stream else reply.json())["metrics"]
    queue, first = took["queue_time_ms"], took["time_to_first_token_ms"]
    decoding = took["generation_time_ms"]
    assert queue < first / 2, "a prompt alone waits for a step at most"
    assert decoding < first / 2, "3 tokens, and passes of 3000"
    # Beside it a reply takes what its server needs to read and to send.
    assert wall / 4 < queue + first + decoding <= wall

    def prefills() -> Samples:
        return {k: v for k, v in since(server.http, before).items() if k == COUNT}

    settle(prefills, {COUNT: 1})
    spent = scrape(server.http)[SECONDS] - before[SECONDS]
    assert 1000 * spent <= first
