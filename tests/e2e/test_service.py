"""What a server with a policy adds to vLLM's: usage, headers, routes, metrics."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice

from asl_vllm import __version__
from asl_vllm.config import POLICY_NAMES
from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import MODEL_NAME, Server
from asl_vllm_testing.settings import BLOCK, CONFIG, LAYERS, POOL_TOKENS, STEP_TOKENS
from tests.e2e.prometheus import scrape, settle, since
from tests.e2e.replies import (
    BUDGET,
    CHAT,
    COMPLETIONS,
    KEPT,
    OTHER,
    PATHS,
    QUESTION,
    REPORT,
    RESPONSES,
    UNPRUNED,
    as_headers,
    body,
    events,
    for_chat,
    kv_headers,
    numbers,
    stats,
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("budget", "report"), [(BUDGET, REPORT), (1000, UNPRUNED)])
def test_usage_and_headers(
    pruning: Server, path: str, budget: int, report: dict[str, Any]
) -> None:
    """Also of a prompt within its budget."""
    response = pruning.post(path, **body(path, kv_budget=budget))
    assert response.status_code == 200, response.text
    expected = for_chat(report, path)
    assert response.json()["usage"]["kv_cache"] == numbers(expected)
    assert kv_headers(response) == as_headers(expected)
    assert response.json()["kv_transfer_params"] == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("budget", "report"), [(BUDGET, REPORT), (1000, UNPRUNED)])
def test_usage_of_streams(
    pruning: Server, path: str, budget: int, report: dict[str, Any]
) -> None:
    options = {} if path == RESPONSES else {"stream_options": {"include_usage": True}}
    response = pruning.post(
        path, **body(path, kv_budget=budget, stream=True, **options)
    )
    assert kv_headers(response) == {}
    *others, last = events(response.text)
    usage = last["response"]["usage"] if path == RESPONSES else last["usage"]
    assert usage["kv_cache"] == numbers(for_chat(report, path))
    assert "kv_cache" not in json.dumps(others)


def test_a_stream_that_asks_for_no_usage_has_none(pruning: Server) -> None:
    asked = body(COMPLETIONS, kv_budget=BUDGET, stream=True)
    assert "kv_cache" not in pruning.post(COMPLETIONS, **asked).text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_kv_transfer_params_in_streams(pruning: Server, path: str) -> None:
    """Of each choice in its last chunk where vLLM has the field there, since 0.33."""
    asked = body(path, kv_budget=BUDGET, stream=True, n=2) | {"temperature": 1}
    chunks = events(pruning.post(path, **asked).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert {choice["index"] for choice in choices} == {0, 1}
    told = [choice for choice in choices if choice.get("kv_transfer_params")]
    expected = for_chat(REPORT, path)
    assert all(choice["kv_transfer_params"] == expected for choice in told)
    assert all(choice["finish_reason"] for choice in told)
    in_chunks = "kv_transfer_params" in CompletionResponseStreamChoice.model_fields
    assert sorted(c["index"] for c in told) == ([0, 1] if in_chunks else [])


def test_a_share_is_told_in_tokens(pruning: Server) -> None:
    for budget, tokens in ((1.0, 600), (0.25, 150), (0.001, 40)):
        reply = pruning.post(COMPLETIONS, **body(COMPLETIONS, kv_budget=budget)).json()
        assert reply["usage"]["kv_cache"]["budget_tokens"] == tokens


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(pruning: Server, stream: bool) -> None:
    """Two prompts, of which one is short enough to keep, with two choices each."""
    asked = {
        **body(COMPLETIONS, kv_budget=BUDGET),
        "prompt": [needle(3, 100).text, QUESTION.text, OTHER.text],
        "temperature": 1.0,
        "n": 2,
    }
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    response = pruning.post(COMPLETIONS, **asked)
    assert response.status_code == 200, response.text
    reply = events(response.text)[-1] if stream else response.json()
    short = {**UNPRUNED, "budget_tokens": BUDGET, "kept_tokens": 100}
    other = {
        **REPORT,
        "kept_tokens": 108,
        "pruned_tokens": 192,
        "freed_blocks": 6,
        "skipped_token_layers": 192 * 5,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
    }
    sequences = [short, short, REPORT, REPORT, other, other]
    counts = REPORT.keys() - {"policy", "selection_layer"}
    whole = {name: sum(part[name] for part in sequences) for name in counts}
    assert reply["usage"]["kv_cache"] == whole
    if not stream:
        whole |= {"policy": "asl", "selection_layer": None}
        assert kv_headers(response) == as_headers(whole)
        assert len(reply["choices"]) == len(sequences)


def test_the_openai_client_keeps_it(pruning: Server) -> None:
    """Bodies, streams and events of the three APIs, as its types see them."""
    client: Any = pruning.openai
    extra = {"kv_budget": BUDGET}
    completion = client.completions.create(
        model=MODEL_NAME, prompt=QUESTION.text, max_tokens=4, extra_body=extra
    )
    assert completion.usage.kv_cache == numbers(REPORT)
    messages = [{"role": "user", "content": QUESTION.text}]
    chat = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=4, extra_body=extra
    )
    assert chat.usage.kv_cache == numbers(for_chat(REPORT, CHAT))
    response = client.responses.create(
        model=MODEL_NAME, input=QUESTION.text, max_output_tokens=4, extra_body=extra
    )
    assert response.usage.kv_cache == numbers(REPORT)
    for path, stream in (
        (
            COMPLETIONS,
            client.completions.create(
                model=MODEL_NAME,
                prompt=QUESTION.text,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            ),
        ),
        (
            CHAT,
            client.chat.completions.create(
                model=MODEL_NAME,
                messages=messages,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            ),
        ),
    ):
        *_, last = stream
        assert last.usage.kv_cache == numbers(for_chat(REPORT, path))
    *_, event = client.responses.create(
        model=MODEL_NAME,
        input=QUESTION.text,
        max_output_tokens=4,
        stream=True,
        extra_body=extra,
    )
    assert event.response.usage.kv_cache == numbers(REPORT)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_depends_on_the_prompt_is_refused_before_a_stream(
    pruning: Server, path: str, stream: bool
) -> None:
    text = needle(11, 2 * POOL_TOKENS).text
    response = pruning.post(path, **body(path, text, stream=stream))
    assert response.status_code == 400, response.text
    assert "do not fit the KV pool" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "kv_budget"


def test_javascripts_1_is_explained(pruning: Server) -> None:
    response = pruning.post(COMPLETIONS, **body(COMPLETIONS, kv_budget=1))
    assert response.status_code == 400
    assert "JavaScript, which writes 1.0 as 1" in response.json()["error"]["message"]


def test_policies(pruning: Server) -> None:
    assert pruning.http.get("/v1/kv/policies").json() == {
        "policy": "asl",
        "policies": list(POLICY_NAMES),
        "default_budget": None,
        "minimum_budget": 8 + BLOCK,
        "block_size": BLOCK,
        "window": 8,
        "max_prompt_tokens": 4096,
        "num_layers": LAYERS,
        # Keys and values, 2 heads of 32, in fp32.
        "kv_bytes_per_token": 2 * 2 * 32 * 4 * LAYERS,
        "pool_tokens": POOL_TOKENS,
        "config": {
            **{"policy": "asl", "budget": None, "pool_kernel": 7, "tau": 0.9},
            **{"reach": 1, "score_layers": 1, "max_prefill_tokens": 4096},
            **{"l_min": 3, "l_obs": 2},
            **{"propagated_share": 0.2, "decay_ratio": 0.9, "bands": 1},
            **{"preset": None, "hidden_memory": "device", "pass_share": 1.0},
            **{"chunk_tokens": STEP_TOKENS, **CONFIG},
        },
        "model": MODEL_NAME,
        "version": __version__,
    }


def test_stats_follow_requests_through_the_layers(pruning: Server) -> None:
    """Polled while prompts longer than the pool wait, are prefilled and decode."""
    before = stats(pruning.http)
    prompts = [needle(20 + i, 3000) for i in range(3)]
    total = POOL_TOKENS // BLOCK
    seen: list[dict[str, Any]] = []
    polling, done = threading.Event(), threading.Event()

    def poll() -> None:
        with pruning.connect() as client:
            while not done.is_set():
                seen.append(stats(client))
                polling.set()
                time.sleep(0.02)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        assert polling.wait(timeout=60)
        # In one body, so that they come together however busy the machine is, and with
        # answers long enough to be seen there.
        asked = body(COMPLETIONS, kv_budget=BUDGET, max_tokens=96, ignore_eos=True)
        asked["prompt"] = [prompt.text for prompt in prompts]
        reply = pruning.post(COMPLETIONS, **asked)
    finally:
        done.set()
        poller.join()
    assert reply.status_code == 200, reply.text
    layers: dict[str, list[int]] = {}
    states: dict[str, list[str]] = {}
    for sight in seen:
        (engine,) = sight["engines"]
        pool_state = engine["pool"]
        assert pool_state["blocks_total"] == total
        assert pool_state["blocks_used"] + pool_state["blocks_free"] == total
        assert pool_state["usage"] == pytest.approx(
            pool_state["blocks_used"] / total, abs=1e-6
        )
        held = [r for r in engine["requests"] if r["blocks_held"]]
        assert pool_state["tokens_saved"] == sum(
            r["num_prompt_tokens"] - r["kept_tokens"] for r in held
        )
        assert sum(r["blocks_held"] for r in held) == pool_state["blocks_used"]
        for r in engine["requests"]:
            assert (r["policy"], r["budget"]) == ("asl", BUDGET)
            assert (r["num_prompt_tokens"], r["num_layers"]) == (3000, LAYERS)
            layers.setdefault(r["request_id"], []).append(r["layer"])
            states.setdefault(r["request_id"], []).append(r["state"])
            assert r["selection_layer"] == (4 if r["layer"] > 4 else None)
    order = ["waiting", "prefilling", "decoding"]
    assert len(layers) == 3
    for name in layers:
        assert layers[name] == sorted(layers[name])
        ranks = [order.index(state) for state in states[name]]
        assert ranks == sorted(ranks)
    assert {state for found in states.values() for state in found} == set(order)
    # Real progress: several layers of one prompt were seen, not only its ends.
    assert max(len(set(found) - {0, LAYERS}) for found in layers.values()) >= 2
    after = stats(pruning.http)
    assert after["engines"][0]["requests"] == []
    assert after["engines"][0]["pool"]["blocks_used"] == 0
    report = reply.json()["usage"]["kv_cache"]
    assert report["budget_tokens"] == 3 * BUDGET
    gained = {k: after["totals"][k] - before["totals"][k] for k in after["totals"]}
    assert gained == {
        "requests": 3,
        "pruned_tokens": report["pruned_tokens"],
        "skipped_token_layers": report["skipped_token_layers"],
        "computed_token_layers": 3 * 3000 * LAYERS - report["skipped_token_layers"],
        "reused_tokens": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
    }


def test_metrics_are_what_requests_reported(pruning: Server) -> None:
    before = scrape(pruning.http)
    for prompt, budget in (
        (QUESTION, BUDGET),
        (OTHER, 0.5),
        (OTHER, 1.0),
        (OTHER, None),
    ):
        asked = body(COMPLETIONS, prompt.text, kv_budget=budget)
        assert pruning.post(COMPLETIONS, **asked).status_code == 200
    assert pruning.post(COMPLETIONS, **body(COMPLETIONS, kv_budget=3)).is_error
    kept, pruned = KEPT + 140, 480 + 160
    skipped = pruned * (LAYERS - 5)
    expected: dict[tuple[str, ...], float] = {
        ("requests_total", "pruned", "asl"): 2,
        ("requests_total", "unpruned", "asl"): 1,
        ("selection_layer_count",): 2,
        ("selection_layer_sum",): 8,
        ("kept_tokens_count",): 2,
        ("kept_tokens_sum",): kept,
        ("pruned_tokens_total",): pruned,
        ("freed_blocks_total",): pruned // BLOCK,
        ("reuse_requests_total", "none"): 2,
        ("prefill_seconds_count",): 2,
        ("token_layers_total", "computed"): 900 * LAYERS - skipped,
        ("token_layers_total", "skipped"): skipped,
    }
    settle(lambda: since(pruning.http, before), expected)


TIMES = ("request_queue_time", "request_prefill_time", "request_decode_time")
PARTS = ("sum", "count")


def test_times_are_booked_where_they_are_spent(pruning: Server) -> None:
    """vLLM's prefill has ours; with queue and decoding it makes the wall time."""

    def read() -> dict[str, float]:
        text = pruning.http.get("/metrics").text
        names = (*TIMES, "time_to_first_token", "e2e_request_latency")
        parts = [f"vllm:{name}_seconds_{part}" for name in names for part in PARTS]
        ours = [f"vllm:asl_prefill_seconds_{part}" for part in PARTS]
        found = dict.fromkeys([*parts, *ours], 0.0)
        for line in text.splitlines():
            name, _, rest = line.partition("{")
            if name in found:
                found[name] += float(rest.rpartition(" ")[2])
        return found

    before = read()
    began = time.monotonic()
    asked = body(COMPLETIONS, needle(41, 3000).text, kv_budget=BUDGET)
    assert pruning.post(COMPLETIONS, **asked).is_success
    wall = time.monotonic() - began
    deadline = time.monotonic() + 10
    while True:
        took = {name: value - before[name] for name, value in read().items()}
        if all(took[name] == 1 for name in took if name.endswith("count")):
            break
        assert time.monotonic() < deadline, took
        time.sleep(0.1)
    queue, prefill, decode, first, whole, ours = (
        took[name] for name in took if name.endswith("sum")
    )
    assert 0 < ours <= prefill
    assert queue < prefill
    assert queue + prefill <= first + 0.05, "all of it comes before the first token"
    assert queue + prefill + decode <= whole + 0.05
    assert whole <= wall


def test_openapi_has_the_field_and_the_routes(pruning: Server) -> None:
    document = pruning.http.get("/openapi.json").json()
    for name in ("CompletionRequest", "ChatCompletionRequest", "ResponsesRequest"):
        field = document["components"]["schemas"][name]["properties"]["kv_budget"]
        assert "share of the prompt" in field["description"]
        kinds = {kind["type"]: kind for kind in field["anyOf"]}
        assert kinds["integer"]["minimum"] == 1
        assert (kinds["number"]["exclusiveMinimum"], kinds["number"]["maximum"]) == (
            *(0, 1),
        )
        assert "null" in kinds
        assert field["examples"] == [2048]
    for path in ("/v1/kv/policies", "/v1/kv/stats"):
        replies = document["paths"][path]["get"]["responses"]
        assert set(replies) == {"200", "503"}
        assert "$ref" in replies["200"]["content"]["application/json"]["schema"]
    assert pruning.http.get("/docs").status_code == 200
