"""``python -m asl_server`` with an API key, TLS and two API servers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import ASL_SERVER, Server, serve
from asl_vllm_testing.settings import LAYERS, SERVER_OPTIONS
from tests.e2e.certificate import write_certificate
from tests.e2e.prometheus import scrape, settle, since

KEY = "secret"
PATHS = ["/v1/kv/policies", "/v1/kv/stats", "/v1/models"]


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = (*SERVER_OPTIONS, "--api-server-count", "2", "--api-key", KEY)
    with serve(
        folder / "log.txt",
        *options,
        module=ASL_SERVER,
        key=KEY,
        certificate=write_certificate(folder),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def clients(scaled: Server) -> Iterator[list[httpx.Client]]:
    """One of each API server: a new connection goes to the less loaded one."""
    scaled.http.close()
    with scaled.connect() as one, scaled.connect() as other:
        for client in (one, other):
            assert client.get("/health").status_code == 200
        yield [one, other]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", [None, "Bearer wrong", KEY])
def test_routes_are_behind_the_key(
    clients: list[httpx.Client], path: str, key: str | None
) -> None:
    for client in clients:
        request = client.build_request("GET", path)
        del request.headers["authorization"]
        if key:
            request.headers["authorization"] = key
        assert client.send(request).status_code == 401
        assert client.get(path).status_code == 200


def test_both_ways_to_start_give_the_same_api(
    scaled: Server, pruning: Server, clients: list[httpx.Client]
) -> None:
    assert scaled.url.startswith("https:")
    ours = clients[0].get("/openapi.json").json()
    assert ours == pruning.http.get("/openapi.json").json()


def test_each_api_server_answers_for_all(clients: list[httpx.Client]) -> None:
    """Requests through one or the other: stats and metrics hold them all, once."""
    before = scrape(clients[0])
    prompts = [needle(i, 300 + 40 * i) for i in range(6)]
    reports: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        asked = {"model": "tiny", "prompt": prompt.text, "max_tokens": 2}
        reply = clients[i % 2].post(
            "/v1/completions", json={**asked, "kv_budget": 96, "temperature": 0}
        )
        assert reply.status_code == 200, reply.text
        report = reply.json()["usage"]["kv_cache"]
        assert reply.headers["x-kv-kept-tokens"] == str(report["kept_tokens"])
        reports.append(report)
    pruned = sum(report["pruned_tokens"] for report in reports)
    skipped = sum(report["skipped_token_layers"] for report in reports)
    computed = sum(len(p.token_ids) for p in prompts) * LAYERS - skipped
    expected: dict[tuple[str, ...], float] = {
        ("requests_total", "pruned", "asl"): 6,
        ("selection_layer_count",): 6,
        ("selection_layer_sum",): 24,
        ("kept_tokens_count",): 6,
        ("kept_tokens_sum",): sum(report["kept_tokens"] for report in reports),
        ("pruned_tokens_total",): pruned,
        ("freed_blocks_total",): sum(report["freed_blocks"] for report in reports),
        ("reuse_requests_total", "none"): 6,
        ("prefill_seconds_count",): 6,
        ("token_layers_total", "computed"): computed,
        ("token_layers_total", "skipped"): skipped,
    }
    for client in clients:
        settle(lambda client=client: since(client, before), expected)
    for client in clients:
        assert client.get("/v1/kv/stats").json()["totals"] == {
            "requests": 6,
            "pruned_tokens": pruned,
            "skipped_token_layers": skipped,
            "computed_token_layers": computed,
            "reused_tokens": 0,
            "filled_tokens": 0,
            "shared_prefills": 0,
        }


def test_a_hit_is_told_and_counted_by_each(clients: list[httpx.Client]) -> None:
    """What was read is vLLM's ``cached_tokens``, the header and the metrics alike."""
    prompt = needle(50, 400)
    asked = {"model": "tiny", "input": prompt.text, "max_output_tokens": 2}
    path = "/v1/responses"
    assert clients[0].post(path, json={**asked, "temperature": 0}).status_code == 200
    before = scrape(clients[1])
    reply = clients[1].post(path, json={**asked, "kv_budget": 96, "kv_reuse": "read"})
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    report = usage["kv_cache"]
    read = report["reused_tokens"]
    assert 0 < read == usage["input_tokens_details"]["cached_tokens"]
    assert reply.headers["x-kv-reused-tokens"] == str(read)
    layers = {
        "skipped": report["skipped_token_layers"],
        "reused": report["reused_token_layers"],
        "rerun": report["rerun_token_layers"],
    }
    assert layers["reused"] == read * 5, "the layers up to the selection's"
    whole = usage["input_tokens"] * LAYERS
    layers["computed"] = whole - layers["skipped"] - layers["reused"] + layers["rerun"]
    expected: dict[tuple[str, ...], float] = {
        ("requests_total", "pruned", "asl"): 1,
        ("selection_layer_count",): 1,
        ("selection_layer_sum",): 4,
        ("kept_tokens_count",): 1,
        ("kept_tokens_sum",): report["kept_tokens"],
        ("pruned_tokens_total",): report["pruned_tokens"],
        ("freed_blocks_total",): report["freed_blocks"],
        ("reuse_requests_total", "hit"): 1,
        ("reused_tokens_total",): read,
        ("prefill_seconds_count",): 1,
        **{("token_layers_total", kind): n for kind, n in layers.items()},
    }
    for client in clients:
        settle(lambda client=client: since(client, before), expected)


def engine_processes(server: Server) -> list[int]:
    """Processes below the server's whose name is the engine core's."""
    below, found = {server.process.pid}, []
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent in below:
            below.add(int(folder.name))
            if title.startswith("VLLM::EngineCore"):
                found.append(int(folder.name))
    return found


def test_health_fails_when_the_engine_is_dead(
    scaled: Server, clients: list[httpx.Client]
) -> None:
    """Last: it ends the server. Within seconds no probe is told that all is well."""
    (engine,) = engine_processes(scaled)
    os.kill(engine, signal.SIGKILL)
    deadline = time.monotonic() + 30
    for path in ("/health", "/v1/kv/stats"):
        for client in clients:
            while time.monotonic() < deadline:
                try:
                    if client.get(path, timeout=15).status_code == 503:
                        break
                except httpx.TransportError:
                    break
                time.sleep(0.05)
            else:
                pytest.fail(f"{path} is still answered as if the engine lived")
    assert scaled.process.wait(timeout=60) is not None
