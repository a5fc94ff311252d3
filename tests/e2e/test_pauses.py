"""Pauses, sleep, cache resets, aborts and repeated ids while a prompt is pruned."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import MODEL_NAME, Server, serve

# Four passes of 64 tokens a step: the long prompt's prefill takes over 100 steps.
CONFIG = {
    "window": 8,
    "selection_layer": 8,
    "chunk_tokens": 64,
    "pass_share": 0.1,
    "check_integrity": True,
}
LONG = needle(3, 3001)
OTHER = needle(4, 120)
KEPT = {128: 121, 512: 505}
"""The largest k for which 3001 - k is whole blocks of 32."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    options = (
        *("--kv-policy", "asl", "--kv-policy-config", json.dumps(CONFIG)),
        *("--max-num-batched-tokens", "256"),
    )
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
    with serve(log, *options, **env) as started:
        yield started


class Asked(threading.Thread):
    """A completion under way."""

    def __init__(self, server: Server, **body: Any) -> None:
        super().__init__()
        self._body = {"model": MODEL_NAME, "temperature": 0, **body}
        self._client = server.connect()
        self.reply: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.reply = self._client.post("/v1/completions", json=self._body)

    def result(self) -> dict[str, Any]:
        self.join(timeout=120)
        assert self.reply is not None, "no answer"
        assert self.reply.status_code == 200, self.reply.text
        answer: dict[str, Any] = self.reply.json()["choices"][0]
        return answer


class Streamed(Asked):
    """As a stream, so that its beginning can be waited for."""

    def __init__(self, server: Server, **body: Any) -> None:
        self._chunks: list[dict[str, Any]] = []
        self.begun = threading.Event()
        super().__init__(server, **body, stream=True)

    def run(self) -> None:
        path = "/v1/completions"
        with self._client.stream("POST", path, json=self._body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    self._chunks.append(chunk["choices"][0])
                    self.begun.set()
        self.reply = reply

    def result(self) -> dict[str, Any]:
        self.join(timeout=120)
        assert self.reply is not None, "no end"
        text = "".join(chunk["text"] for chunk in self._chunks)
        return {**self._chunks[-1], "text": text}


def stats(server: Server) -> dict[str, Any]:
    (engine,) = server.http.get("/v1/kv/stats").json()["engines"]
    return dict(engine)


def layer(server: Server) -> int:
    (request,) = stats(server)["requests"]
    assert request["state"] == "prefilling"
    return int(request["layer"])


def begin(server: Server, tokens: int = 200) -> tuple[Asked, Streamed]:
    """A prompt in the middle of its prefill, beside an unpruned one that decodes.

    ``tokens`` is how long the latter goes on. It comes first and is waited for: what
    comes after a call is not paused or aborted by it.
    """
    plain = Streamed(server, prompt=OTHER.text, max_tokens=tokens, ignore_eos=True)
    assert plain.begun.wait(timeout=60)
    pruned = Asked(server, prompt=LONG.text, kv_budget=128, max_tokens=4)
    deadline = time.monotonic() + 60
    while not any(r["state"] == "prefilling" for r in stats(server)["requests"]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return pruned, plain


@pytest.fixture(scope="module")
def alone(server: Server) -> str:
    """What the unpruned one answers when nothing happens."""
    asked = Asked(server, prompt=OTHER.text, max_tokens=200, ignore_eos=True)
    return str(asked.result()["text"])


def post(server: Server, path: str) -> None:
    reply = server.http.post(path)
    assert reply.status_code == 200, reply.text


def assert_whole(server: Server) -> None:
    """It serves, holds nothing, and its books agree."""
    assert server.http.get("/is_paused").json() == {"is_paused": False}
    asked = Asked(server, prompt=needle(7, 600).text, kv_budget=128, max_tokens=4)
    assert asked.result()["text"].split() == needle(7, 600).answer_words
    after = stats(server)
    assert (after["pool"]["blocks_used"], after["requests"]) == (0, [])
    assert "the KV pool is inconsistent" not in server.log.read_text()


@pytest.mark.parametrize(
    "calls",
    [
        ["/pause?mode=keep", "/resume"],
        ["/reset_prefix_cache?reset_running_requests=true"],
        ["/pause?mode=wait", "/resume"],
        ["/pause?mode=keep&clear_cache=false", "/resume"],
        ["/sleep?level=0&mode=keep", "/wake_up?tags=scheduling"],
    ],
    ids=["keep", "reset", "wait", "keep caches", "sleep"],
)
def test_requests_go_on(server: Server, alone: str, calls: list[str]) -> None:
    pruned, plain = begin(server)
    for call in calls:
        post(server, call)
        paused = call.startswith(("/pause", "/sleep"))
        assert server.http.get("/is_paused").json() == {"is_paused": paused}
        if paused and "wait" not in call and stats(server)["requests"][0]["layer"]:
            # The caches were kept, so the prefill goes on where it is, later.
            before = layer(server)
            time.sleep(0.5)
            assert layer(server) == before
    assert pruned.result()["text"].split() == LONG.answer_words
    assert plain.result()["text"] == alone
    assert_whole(server)


@pytest.mark.parametrize("call", ["/pause?mode=abort", "/abort_requests"])
def test_requests_are_aborted(server: Server, call: str) -> None:
    both = begin(server, tokens=3000)  # still going on if the call comes late
    reply = server.http.post(call, json={})
    assert reply.status_code == 200, reply.text
    assert [asked.result()["finish_reason"] for asked in both] == ["abort"] * 2
    assert stats(server)["pool"]["blocks_used"] == 0
    post(server, "/resume")
    assert_whole(server)


def test_the_same_id_again_after_hanging_up(server: Server) -> None:
    """Each retry is answered, with its own budget."""
    for attempt in range(6):
        name = f"job-{attempt % 2}"
        with pytest.raises(httpx.ReadTimeout):
            ask(server, name, 128, timeout=0.15 + 0.2 * attempt)
        budget = (128, 512)[attempt % 3 > 0]
        reply = ask(server, name, budget)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["kv_cache"]["kept_tokens"] == KEPT[budget]
    assert_whole(server)


def test_an_id_that_another_request_has(server: Server) -> None:
    """Both go on, as where ids are random."""
    first = Asked(server, prompt=LONG.text, kv_budget=128, request_id="twin")
    deadline = time.monotonic() + 60
    while not stats(server)["requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for more in ({}, {"stream": True}, {"n": 2, "temperature": 1}):
        reply = server.post(
            "/v1/completions", prompt="the sky", request_id="twin", max_tokens=2, **more
        )
        assert reply.status_code == 200, reply.text
        assert "error" not in reply.text
    assert first.result()["text"].split()[:4] == LONG.answer_words
    assert_whole(server)


def ask(server: Server, name: str, budget: int, timeout: float = 120) -> httpx.Response:
    with server.connect() as client:
        return client.post(
            "/v1/completions",
            json={
                "model": MODEL_NAME,
                "prompt": LONG.text,
                "kv_budget": budget,
                "max_tokens": 4,
                "temperature": 0,
            },
            headers={"x-request-id": name},
            timeout=timeout,
        )
