"""A server without an engine: the page's router and canned answers of the API."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from asl_server import page
from asl_vllm import __version__

NUM_LAYERS = 32
BLOCK_SIZE = 32

POLICIES: dict[str, Any] = {
    "policy": "asl",
    "policies": ["none", "asl", "snapkv"],
    "default_budget": None,
    "minimum_budget": 64,
    "block_size": BLOCK_SIZE,
    "window": 32,
    "max_prompt_tokens": 131072,
    "num_layers": NUM_LAYERS,
    "kv_bytes_per_token": 131072,
    "pool_tokens": 209696,
    "config": {"tau": 0.3},
    "model": "canned-8b",
    "version": __version__,
}


def request(name: str, **changes: Any) -> dict[str, Any]:
    """A pruned request as ``/v1/kv/stats`` shows it."""
    return {
        "request_id": name,
        "policy": "asl",
        "budget": 2048,
        "num_prompt_tokens": 32768,
        "kept_tokens": 2048,
        "state": "prefilling",
        "layer": 0,
        "num_layers": NUM_LAYERS,
        "selection_layer": None,
        "reused_tokens": 0,
        "blocks_held": 64,
        **changes,
    }


def engine(index: int, requests: list[dict[str, Any]], used: int) -> dict[str, Any]:
    """An engine as ``/v1/kv/stats`` shows it; ``used`` in blocks."""
    total = POLICIES["pool_tokens"] // BLOCK_SIZE
    saved = sum(
        request["num_prompt_tokens"] - request["kept_tokens"]
        for request in requests
        if request["blocks_held"]
    )
    return {
        "index": index,
        "pool": {
            "block_size": BLOCK_SIZE,
            "blocks_total": total,
            "blocks_used": used,
            "blocks_free": total - used,
            "blocks_pinned": 0,
            "tokens_saved": saved,
            "usage": used / total,
        },
        "requests": requests,
    }


TOTALS = {
    "requests": 1284,
    "pruned_tokens": 38412288,
    "skipped_token_layers": 691421184,
    "computed_token_layers": 540934144,
    "reused_tokens": 9437184,
    "filled_tokens": 4096,
    "shared_prefills": 96,
}

BUSY: dict[str, Any] = {
    "engines": [
        engine(
            0,
            [
                request(
                    "cmpl-7d1f0c52a9e84b0f-0",
                    state="decoding",
                    layer=NUM_LAYERS,
                    selection_layer=13,
                    reused_tokens=24576,
                    blocks_held=71,
                ),
                request("chatcmpl-b3a64e1d57f2-0", layer=21, selection_layer=15),
                request(
                    "cmpl-0e95c7f4d8a1-0",
                    budget=0.1,
                    num_prompt_tokens=65536,
                    kept_tokens=6528,
                    layer=9,
                    blocks_held=204,
                ),
                request("cmpl-52c1b7aa90de-0", state="waiting", blocks_held=0),
            ],
            used=1412,
        )
    ],
    "totals": TOTALS,
}

IDLE: dict[str, Any] = {
    "engines": [engine(0, [], 0)],
    "totals": dict.fromkeys(TOTALS, 0),
}


def completion(text: str, result: dict[str, Any] | None) -> dict[str, Any]:
    """A reply of ``/v1/completions``, with what came of its prompt's plan."""
    usage: dict[str, Any] = {"prompt_tokens": 2008, "completion_tokens": 6}
    if result:
        usage["kv_cache"] = {k: v for k, v in result.items() if k != "policy"}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": POLICIES["model"],
        "choices": [{"index": 0, "text": text, "finish_reason": "length"}],
        "usage": usage,
        "kv_transfer_params": result,
    }


PRUNED = {
    "policy": "asl",
    "budget_tokens": 502,
    "selection_layer": 13,
    "kept_tokens": 472,
    "pruned_tokens": 1536,
    "freed_blocks": 48,
    "skipped_token_layers": 27648,
    "reused_tokens": 1024,
}


@dataclasses.dataclass
class Canned:
    """What the server answers, and what it was asked."""

    url: str = ""
    policies: dict[str, Any] = dataclasses.field(default_factory=dict)
    stats: Any = None
    status: int = 200
    """Status of the statistics; other than 200 with an error body."""
    api_key: str | None = None
    text: str = " 7 3 9 1 ."
    delay: float = 0.0
    """Seconds that a completion without a budget takes; with one, a third."""
    polls: int = 0
    bodies: list[str] = dataclasses.field(default_factory=list)
    """Bodies of completions, as they came."""

    def reset(self) -> None:
        """Back to the start, the address apart."""
        fresh = Canned(
            url=self.url, policies=copy.deepcopy(POLICIES), stats=copy.deepcopy(BUSY)
        )
        self.__dict__.update(fresh.__dict__)


def make_app(canned: Canned) -> FastAPI:
    """The app that answers from ``canned``, which may change while it runs."""
    app = FastAPI()
    app.include_router(page.router)

    def refusal(request: Request) -> Response | None:
        expected = f"Bearer {canned.api_key}"
        if canned.api_key and request.headers.get("authorization") != expected:
            return JSONResponse({"error": "Unauthorized"}, 401)  # as vLLM says it
        return None

    @app.get("/v1/kv/policies")
    def policies(request: Request) -> Response:
        return refusal(request) or JSONResponse(canned.policies)

    @app.get("/v1/kv/stats")
    def stats(request: Request) -> Response:
        canned.polls += 1
        if canned.status != 200:
            return Response(status_code=canned.status)
        return refusal(request) or JSONResponse(canned.stats)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        refused = refusal(request)
        if refused:
            return refused
        text = (await request.body()).decode()
        canned.bodies.append(text)
        budget = json.loads(text)["kv_budget"]
        if budget == 16:
            return JSONResponse(
                {"error": {"message": "kv_budget: got 16; allowed: at least 64."}}, 400
            )
        await asyncio.sleep(canned.delay / (1 if budget is None else 3))
        return JSONResponse(completion(canned.text, PRUNED if budget else None))

    return app


@contextlib.contextmanager
def serving(canned: Canned) -> Iterator[Canned]:
    """Serves on a free port of this machine, in a thread."""
    canned.reset()
    config = uvicorn.Config(make_app(canned), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise RuntimeError("the canned server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    canned.url = f"http://127.0.0.1:{port}"
    try:
        yield canned
    finally:
        server.should_exit = True
        thread.join(10)
