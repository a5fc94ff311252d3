"""A server whose clients misbehave, and that is told to stop or loses its engine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from asl_vllm_testing.oracle.tasks import Prompt, needle
from asl_vllm_testing.server import MODEL_NAME, Server, serve

API_KEY = "sk-a-secret-that-no-log-may-show"
CONFIG = {"window": 8, "selection_layer": 4, "check_integrity": True}
POOL_TOKENS = 1984
HEADERS = {"authorization": f"Bearer {API_KEY}"}
SECRET_PROMPT = "the secret key is 1 2 3 4 . question : the secret key is"


def options(*more: str) -> tuple[str, ...]:
    return (
        *("--kv-policy", "asl", "--kv-policy-config", json.dumps(CONFIG)),
        *("--num-gpu-blocks-override", str(POOL_TOKENS // 32 + 1)),
        *more,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Small steps, so that prompts are in the middle of their prefill for a while."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    more = ("--max-num-batched-tokens", "256")
    # vLLM itself logs its arguments, so the key does not come as one.
    env = {"VLLM_API_KEY": API_KEY, "VLLM_LOGGING_LEVEL": "INFO"}
    with serve(log, *options(*more), **env) as started:
        started.http.headers.update(HEADERS)
        yield started


def ask(server: Server, prompt: Prompt, budget: Any, **more: Any) -> httpx.Response:
    return server.post(
        "/v1/completions",
        prompt=prompt.text,
        kv_budget=budget,
        temperature=0,
        **{"max_tokens": 4, **more},
    )


def assert_serves(server: Server) -> None:
    """Right answers with and without a budget, and idle without a lost block."""
    question = needle(7, 600)
    for budget in (None, 128):
        answer = ask(server, question, budget)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"].split() == question.answer_words
    assert server.process.poll() is None
    assert server.http.get("/health").status_code == 200


def workers(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_200_clients_at_once(server: Server) -> None:
    """Every fourth without a budget; none is lost and none gets another's answer."""
    asked = [
        (needle(300 + i, 150 + 7 * (i % 20)), 80 + 16 * (i % 4) if i % 4 else None)
        for i in range(200)
    ]
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(
        base_url=server.url, timeout=300, limits=limits, headers=HEADERS
    ) as client:

        def one(item: tuple[Prompt, int | None]) -> tuple[int, bool]:
            prompt, budget = item
            answer = client.post(
                "/v1/completions",
                json={
                    "model": MODEL_NAME,
                    "prompt": prompt.text,
                    "temperature": 0,
                    "max_tokens": 4,
                    "kv_budget": budget,
                },
            )
            words = answer.json()["choices"][0]["text"].split()
            return answer.status_code, words == prompt.answer_words

        with ThreadPoolExecutor(200) as pool:
            results = list(pool.map(one, asked))
    assert [status for status, _ in results] == [200] * 200
    # The small model itself misses a needle now and then.
    assert sum(right for _, right in results) >= 180
    assert_serves(server)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.0])
def test_clients_that_go_away(server: Server, seconds: float, stream: bool) -> None:
    """In the middle of a prefill, or of a stream, whichever it has come to."""
    prompts = [needle(40 + i, 3000) for i in range(3)]

    def leave(prompt: Prompt) -> bool:
        """Asks, and hangs up ``seconds`` later; whether that was in the middle."""
        body = {
            "model": MODEL_NAME,
            "prompt": prompt.text,
            "kv_budget": 256,
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": stream,
        }
        deadline = time.monotonic() + seconds
        with httpx.Client(base_url=server.url, headers=HEADERS) as client:
            try:
                with client.stream(
                    "POST", "/v1/completions", json=body, timeout=seconds
                ) as answer:
                    for _ in answer.iter_bytes():
                        if time.monotonic() > deadline:
                            return True
            except httpx.ReadTimeout:
                return True
        return False

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert any(pool.map(leave, prompts))
    assert_serves(server)


def test_a_client_that_leaves_its_stream(server: Server) -> None:
    with server.http.stream(
        "POST",
        "/v1/completions",
        json={
            "model": MODEL_NAME,
            "prompt": needle(50, 700).text,
            "kv_budget": 96,
            "max_tokens": 500,
            "ignore_eos": True,
            "stream": True,
        },
    ) as answer:
        lines = answer.iter_lines()
        for _ in range(3):
            next(lines)
    assert_serves(server)


STRANGE: list[Any] = [
    10**400,
    -(10**400),
    2**63,
    1e308,
    5e-324,
    -0.0,
    "9" * 5000,
    "__import__('os').system('true')",
    "/etc/passwd",
    {"a": {"b": [1] * 1000}},
    [[[[[[[[[[1]]]]]]]]]],
    [],
    {},
    True,
]


@pytest.mark.parametrize("place", ["kv_budget", "vllm_xargs"])
def test_strange_numbers_neither_stop_nor_swell_the_server(
    server: Server, place: str
) -> None:
    assert_serves(server)
    before = sum(p.memory_info().rss for p in workers(server))
    for value in STRANGE:
        field = value if place == "kv_budget" else {"kv_budget": value}
        answer = server.post(
            "/v1/completions", prompt="the key is", max_tokens=2, **{place: field}
        )
        assert answer.status_code in (200, 400, 422), answer.text
        assert len(answer.text) < 20_000
    after = sum(p.memory_info().rss for p in workers(server))
    assert after - before < 100 << 20
    assert_serves(server)


def test_deep_json_is_refused(server: Server) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    text = f'{{"model": "{MODEL_NAME}", "prompt": "the key", "kv_budget": {deep}}}'
    answer = server.http.post(
        "/v1/completions", content=text, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422, 500)
    assert_serves(server)


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_port": 1},
        {"do_remote_decode": True},
        {"kv_budget": 2, "pruned_tokens": 1 << 40, "slots": [0]},
        {"path": "/etc/passwd", "__reduce__": "os.system"},
    ],
)
def test_kv_transfer_params_of_a_request_do_nothing(
    server: Server, params: dict[str, Any]
) -> None:
    """vLLM takes them for its connectors; ours does not read them."""
    question = needle(8, 500)
    want = ask(server, question, 96).json()
    answer = ask(server, question, 96, kv_transfer_params=params)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    assert got["choices"][0]["text"] == want["choices"][0]["text"]
    assert got["kv_transfer_params"] == want["kv_transfer_params"]
    assert_serves(server)


def test_the_log_shows_neither_keys_nor_prompts(server: Server) -> None:
    refused = httpx.get(f"{server.url}/v1/models", timeout=30)
    assert refused.status_code == 401
    for budget in (48, 3, "x", None):
        server.post(
            "/v1/completions", prompt=SECRET_PROMPT * 20, kv_budget=budget, max_tokens=2
        )
    assert_serves(server)
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "asl_vllm" in log and " INFO " in log
    assert API_KEY not in log
    assert "the secret key is" not in log


def long_prefill(server: Server, patience: float = 60) -> threading.Thread:
    """A request from a thread of its own, which hangs up after ``patience`` s."""

    def send() -> None:
        body = {"prompt": needle(60, 4000).text, "kv_budget": 512, "max_tokens": 64}
        with (
            httpx.Client(
                base_url=server.url, headers=HEADERS, timeout=patience
            ) as client,
        ):
            try:
                client.post("/v1/completions", json={"model": MODEL_NAME, **body})
            except httpx.TransportError:
                return

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(server: Server, family: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    server.process.wait(timeout=seconds)
    while any(map(alive, family)):
        assert time.monotonic() < deadline, family
        time.sleep(0.2)


def test_sigterm_during_a_prefill(server: Server) -> None:
    """The last test of this server: it and all its processes end, and soon.

    vLLM may end the engine without telling the requests in flight, and then waits
    for their clients to hang up (docs/limits.md): these do so after 15 s.
    """
    family = workers(server)
    assert family
    clients = [long_prefill(server, patience=15) for _ in range(3)]
    time.sleep(0.7)
    server.process.send_signal(signal.SIGTERM)
    assert_gone(server, family, 45)
    for client in clients:
        client.join(timeout=30)
        assert not client.is_alive()


def test_a_killed_worker_ends_the_server(tmp_path: Path) -> None:
    """The worker lives in the engine's process; no client waits for ever."""
    with serve(tmp_path / "log.txt", *options()) as server:
        family = workers(server)
        (core,) = [p for p in family if "VLLM::Engine" in " ".join(p.cmdline())]
        client = long_prefill(server)
        time.sleep(0.5)
        os.kill(core.pid, signal.SIGKILL)
        client.join(timeout=30)
        assert not client.is_alive()
        assert_gone(server, family, 30)
