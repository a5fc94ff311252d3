"""The HTTP surface of a real server, with and without a policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import MODEL_NAME, Server, serve
from asl_vllm_testing.settings import POOL_TOKENS
from tests.e2e.prometheus import scrape, settle, since

BAD = [0, -1, 1.5, True, "x", [1], {"tokens": 64}, 1, 39, 64.0, "NaN"]
QUESTION = needle(7, 600)


def body(path: str) -> dict[str, Any]:
    if path.endswith("chat/completions"):
        return {"messages": [{"role": "user", "content": QUESTION.text}]}
    return {"prompt": QUESTION.text}


def send(server: Server, path: str, budget: Any, **more: Any) -> httpx.Response:
    """Posts a request; the string "NaN" stands for the bare JSON token."""
    request = {"model": MODEL_NAME, **body(path), "kv_budget": budget, **more}
    text = json.dumps({"temperature": 0, "max_tokens": 4, **request})
    return server.http.post(
        path,
        content=text.replace('"NaN"', "NaN"),
        headers={"content-type": "application/json"},
    )


def assert_refused(
    response: httpx.Response, words: str, parameter: str = "kv_budget"
) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == parameter
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert words in error["message"]


def len_of_repr(budget: Any) -> str:
    return repr(budget) if len(repr(budget)) < 10 else "huge"


PATHS = ["/v1/completions", "/v1/chat/completions"]
ALL_PATHS = [*PATHS, "/v1/responses"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", BAD, ids=str)
def test_bad_budgets_are_refused(
    pruning: Server, path: str, stream: bool, budget: Any
) -> None:
    response = send(pruning, path, budget, stream=stream)
    assert_refused(response, "allowed: an integer of at least 40 tokens per layer")
    shown = "nan" if budget == "NaN" else repr(budget)
    assert f"kv_budget: got {shown}" in response.json()["error"]["message"]


@pytest.mark.parametrize("value", ["full", "all", True])
def test_full_shallow_layers_are_refused_without_bands(
    pruning: Server, value: Any
) -> None:
    response = send(pruning, "/v1/completions", 64, kv_shallow=value)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "kv_shallow"
    assert ("--kv-bands" in error["message"]) == (value == "full")
    response = send(pruning, "/v1/completions", 64, kv_shallow="snapkv")
    assert response.status_code == 200


def test_bad_budgets_in_vllm_xargs_are_refused(pruning: Server) -> None:
    response = pruning.post(
        "/v1/completions", **body("/v1/completions"), vllm_xargs={"kv_budget": 3}
    )
    assert_refused(response, "kv_budget: got 3")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("budget", [64, 0.25, 1.0, 10**6, 10**300], ids=len_of_repr)
def test_good_budgets_are_answered(pruning: Server, path: str, budget: Any) -> None:
    response = send(pruning, path, budget)
    assert response.status_code == 200, response.text
    report = response.json()["kv_transfer_params"]
    num_tokens = response.json()["usage"]["prompt_tokens"]
    assert report["policy"] == "asl"
    assert report["kept_tokens"] + report["pruned_tokens"] == num_tokens
    assert report["freed_blocks"] == report["pruned_tokens"] // 32
    if budget in (64, 0.25):
        assert report["selection_layer"] == 4
        asked = budget * num_tokens if budget < 1 else budget
        assert asked - 32 < report["kept_tokens"] <= asked
    else:
        assert report["pruned_tokens"] == 0


def test_no_budget_is_stock(pruning: Server) -> None:
    response = send(pruning, "/v1/completions", None)
    assert response.status_code == 200
    assert response.json()["kv_transfer_params"] is None


def test_the_openai_client(pruning: Server) -> None:
    answer = pruning.openai.completions.create(
        model=MODEL_NAME,
        prompt=QUESTION.text,
        temperature=0,
        max_tokens=4,
        n=1,
        extra_body={"kv_budget": 128},
    )
    assert answer.choices[0].text.split() == QUESTION.answer_words
    assert answer.kv_transfer_params["budget_tokens"] == 128  # type: ignore[attr-defined]
    chat = pruning.openai.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": QUESTION.text}],
        max_tokens=4,
        extra_body={"kv_budget": 128},
    )
    assert chat.kv_transfer_params["budget_tokens"] == 128  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="kv_budget"):
        pruning.openai.completions.create(
            model=MODEL_NAME, prompt="a b c", extra_body={"kv_budget": 2}
        )


def test_streams_and_several_choices(pruning: Server) -> None:
    stream = pruning.openai.completions.create(
        model=MODEL_NAME,
        prompt=QUESTION.text,
        temperature=0,
        max_tokens=4,
        stream=True,
        extra_body={"kv_budget": 128},
    )
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text.split() == QUESTION.answer_words
    several = pruning.openai.completions.create(
        model=MODEL_NAME,
        prompt=QUESTION.text,
        temperature=0.5,
        seed=1,
        n=3,
        max_tokens=4,
        extra_body={"kv_budget": 128},
    )
    assert len(several.choices) == 3


def test_responses_api(pruning: Server) -> None:
    good = pruning.post(
        "/v1/responses", input=QUESTION.text, kv_budget=64, max_output_tokens=4
    )
    assert good.status_code == 200, good.text
    assert good.json()["kv_transfer_params"]["budget_tokens"] == 64
    bad = pruning.post("/v1/responses", input=QUESTION.text, kv_budget=3)
    assert_refused(bad, "kv_budget: got 3")


@pytest.mark.parametrize("path", ALL_PATHS)
def test_a_budget_in_a_wrong_place_is_refused(pruning: Server, path: str) -> None:
    """Where vLLM would drop it and answer; streamed or not."""
    asked = {"input": QUESTION.text} if path == "/v1/responses" else body(path)
    for stream in (False, True):
        for name, fields, said in (
            ("extra_body", {"kv_budget": 64}, "kv_budget is not read in extra_body."),
            ("kv_buget", 64, "kv_buget is no field of requests; got 64"),
        ):
            reply = pruning.post(path, **asked, stream=stream, **{name: fields})
            assert_refused(reply, said, name)
    both = pruning.post(path, **asked, kv_budget=64, vllm_xargs={"kv_budget": 128})
    assert_refused(both, "got 64 in the body and 128 in its vllm_xargs")
    assert_refused(pruning.post(path, **asked, vllm_xargs={"kv_budget": True}), "True")
    assert pruning.post(path, **asked, vllm_xargs={"kv_budget": None}).is_success


def test_prompt_logprobs_need_the_whole_prompt(pruning: Server) -> None:
    """Harnesses ask for them by ``echo`` and ``logprobs``."""
    scoring = {"echo": True, "logprobs": 1, "max_tokens": 1}
    response = pruning.post(
        "/v1/completions", prompt="x " * 300, **scoring, kv_budget=64
    )
    assert_refused(response, "echo with logprobs")
    response = send(pruning, "/v1/completions", 64, prompt_logprobs=1)
    assert_refused(response, "cannot be combined with prompt_logprobs")
    assert send(pruning, "/v1/completions", 1.0, prompt_logprobs=1).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_beam_search_does_not_prune(pruning: Server, path: str) -> None:
    response = send(pruning, path, 64, use_beam_search=True, n=2)
    assert_refused(response, "cannot be combined with beam search")
    response = send(pruning, path, None, use_beam_search=True, n=2, kv_policy="none")
    assert_refused(response, "cannot be combined with beam search", "kv_policy")
    before = scrape(pruning.http)
    response = send(pruning, path, None, use_beam_search=True, n=2)
    assert response.status_code == 200, response.text
    # Its sequences end by aborts, which are nobody's.
    assert response.json()["kv_transfer_params"] is None
    assert "kv_cache" not in response.json()["usage"]
    settle(lambda: since(pruning.http, before), {})


POLICIES = {
    "asl": 4,
    "snapkv": None,
    "fastkv": 4,
    "gemfilter": 4,
    "pyramidinfer": 1,
}
"""The layer after which each drops tokens; the config fixes 4 where it can be fixed."""


def ask_policy(server: Server, path: str, policy: Any, **more: Any) -> httpx.Response:
    """A request to any of the three APIs, with a budget unless told."""
    if path != "/v1/responses":
        budget = more.pop("kv_budget", 128)
        return send(server, path, budget, kv_policy=policy, **more)
    asked = {"kv_budget": 128, "max_output_tokens": 4, "temperature": 0, **more}
    return server.post(path, input=QUESTION.text, kv_policy=policy, **asked)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_names_its_policy(pruning: Server, path: str, policy: str) -> None:
    response = ask_policy(pruning, path, policy)
    assert response.status_code == 200, response.text
    report = response.json()["kv_transfer_params"]
    assert report["policy"] == policy
    assert report["selection_layer"] == POLICIES[policy]
    assert report["kept_tokens"] <= 128
    assert (report["skipped_token_layers"] > 0) == (policy != "snapkv")


@pytest.mark.parametrize("path", ALL_PATHS)
def test_no_policy_and_no_budget_prune_nothing(pruning: Server, path: str) -> None:
    for response in (
        ask_policy(pruning, path, "none"),
        ask_policy(pruning, path, "gemfilter", kv_budget=None),
    ):
        assert response.status_code == 200, response.text
        assert response.json()["kv_transfer_params"] is None
    report = ask_policy(pruning, path, None).json()["kv_transfer_params"]
    assert report["policy"] == "asl"  # the server's


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("policy", ["h2o", "", "ASL", 1, True, ["asl"], {}], ids=str)
def test_bad_policies_are_refused(
    pruning: Server, path: str, stream: bool, policy: Any
) -> None:
    response = ask_policy(pruning, path, policy, stream=stream)
    words = f"kv_policy: got {policy!r}; allowed: none, asl, fastkv, gemfilter, "
    assert_refused(response, words, "kv_policy")


def test_policies_by_other_ways(pruning: Server) -> None:
    asked = body("/v1/completions")
    xargs = {"kv_budget": 128, "kv_policy": "snapkv"}
    report = pruning.post("/v1/completions", **asked, vllm_xargs=xargs)
    assert report.json()["kv_transfer_params"]["policy"] == "snapkv"
    refused = pruning.post("/v1/completions", **asked, vllm_xargs={"kv_policy": "x"})
    assert_refused(refused, "kv_policy: got 'x'", "kv_policy")
    stream = pruning.openai.completions.create(
        model=MODEL_NAME,
        prompt=QUESTION.text,
        temperature=0,
        max_tokens=4,
        stream=True,
        extra_body={"kv_budget": 128, "kv_policy": "fastkv"},
    )
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text.split() == QUESTION.answer_words


def test_a_prompt_four_times_the_pool(pruning: Server) -> None:
    """Answered with a budget, refused without; the front end knows the pool."""
    long = needle(11, 4 * POOL_TOKENS)
    asked = {"prompt": long.text, "max_tokens": 4, "temperature": 0}
    answer = pruning.post("/v1/completions", **asked, kv_budget=256)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"].split() == long.answer_words
    assert answer.json()["kv_transfer_params"]["kept_tokens"] == 256
    refused = pruning.post("/v1/completions", **asked)
    words = f"{4 * POOL_TOKENS} prompt tokens do not fit the KV pool of {POOL_TOKENS}"
    assert_refused(refused, words)
    assert "a kv_budget of 40 to" in refused.json()["error"]["message"]


def test_the_field_is_documented(pruning: Server) -> None:
    schemas = pruning.http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest", "ResponsesRequest"):
        field = schemas[name]["properties"]["kv_budget"]
        assert "share of the prompt" in field["description"]
        assert {"type": "null"} in field["anyOf"]
        field = schemas[name]["properties"]["kv_policy"]
        assert set(POLICIES) < set(field["anyOf"][0]["enum"])
        assert "none prunes nothing" in field["description"]
        assert field["examples"] == ["snapkv"]


def test_many_clients_at_once(pruning: Server) -> None:
    """Budgets of all kinds side by side; each answer is right and none is lost."""
    asked = [
        (needle(50 + i, 300 + 60 * i), b) for i in range(6) for b in (None, 96, 128)
    ]

    def ask(item: Any) -> bool:
        prompt, budget = item
        answer = pruning.openai.completions.create(
            model=MODEL_NAME,
            prompt=prompt.text,
            temperature=0,
            max_tokens=4,
            extra_body={"kv_budget": budget},
        )
        return answer.choices[0].text.split() == prompt.answer_words

    with ThreadPoolExecutor(12) as pool:
        marks = list(pool.map(ask, asked))
    assert sum(marks) >= len(marks) - 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a policy."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(log) as server:
        yield server


def test_a_server_without_a_policy_refuses_budgets(plain: Server) -> None:
    for path in PATHS:
        for stream in (False, True):
            response = send(plain, path, 64, stream=stream)
            assert_refused(response, "started without --kv-policy")
            response = send(plain, path, None, kv_policy="none", stream=stream)
            assert_refused(response, "started without --kv-policy", "kv_policy")
        assert send(plain, path, None, kv_policy=None).status_code == 200
    # With nothing of ours in any reply.
    reply = send(plain, "/v1/completions", None)
    assert "kv_cache" not in reply.text
    assert not [name for name in reply.headers if name.startswith("x-kv")]
    assert "asl_" not in plain.http.get("/metrics").text
    assert plain.http.get("/v1/kv/stats").status_code == 404
    offline = plain.post("/v1/completions", prompt="a b", vllm_xargs={"kv_budget": 64})
    assert_refused(offline, "started without --kv-policy")


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": needle(number, 600).text}]


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# A prompt each: cached tokens depend on what was asked before, and on the pool.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": needle(101, 600).text}),
    "prompts": ("/v1/completions", {"prompt": [needle(102, 600).text, "the sky"]}),
    "stop": ("/v1/completions", {"prompt": needle(103, 600).text, "stop": ["9"]}),
    "stream": ("/v1/completions", {"prompt": needle(104, 600).text, **USAGE}),
    "chat": ("/v1/chat/completions", {"messages": chat(105)}),
    "chat stream": ("/v1/chat/completions", {"messages": chat(106), **USAGE}),
    "batch": ("/v1/chat/completions/batch", {"messages": [chat(107), chat(108)]}),
    "response": ("/v1/responses", {"input": needle(109, 600).text}),
    "response stream": (
        "/v1/responses",
        {"input": needle(110, 600).text, "stream": True},
    ),
    "choices": (
        "/v1/chat/completions",
        {"messages": chat(114), "n": 2, "temperature": 1, "top_k": 1, "logprobs": True},
    ),
    "message": ("/v1/messages", {"messages": chat(111)}),
    "message stream": ("/v1/messages", {"messages": chat(112), "stream": True}),
    "unknown field": ("/v1/completions", {"prompt": needle(113, 600).text, "foo": 1}),
    "no prompt": ("/v1/chat/completions", {}),
    "score": (
        "/generative_scoring",
        {"query": "the sky", "items": ["is"], "label_token_ids": [5, 6]},
    ),
}
"""Requests without a budget to every endpoint that generates."""
OWN = {
    *("id", "item_id", "request_id", "response_id", "system_fingerprint"),
    *("created", "created_at", "completed_at"),
}
"""What differs from request to request, or from server to server, in vLLM too."""


def alike(value: Any) -> Any:
    """A reply less its ids and times."""
    if isinstance(value, dict):
        return {k: alike(v) if k not in OWN else type(v) for k, v in value.items()}
    return [alike(part) for part in value] if isinstance(value, list) else value


def all_of(response: httpx.Response) -> Any:
    """Status, names of headers, and the body or the events, field for field."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
    return (
        response.status_code,
        sorted(response.headers),
        [alike(json.loads(x)) if x.startswith(("{", "[{")) else x for x in lines],
    )


@pytest.mark.parametrize("kind", STOCK)
def test_without_a_budget_replies_are_vllms_own(
    pruning: Server, plain: Server, kind: str
) -> None:
    path, asked = STOCK[kind]
    # A stream's chunks hold what was made meanwhile; only of one token are they alike.
    tokens = 1 if asked.get("stream") else 4
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    length = {} if path == "/generative_scoring" else {name: tokens}
    replies = [
        all_of(server.post(path, **{"temperature": 0, **length, **asked}))
        for server in (pruning, plain)
    ]
    assert replies[0] == replies[1]
    assert (replies[0][0] == 200) == (kind != "no prompt")
