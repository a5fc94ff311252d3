"""Request bodies: valid ones with hostile fields, and bytes that are no JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MODEL = "tiny"
WORDS = "the red key is 7 3 9 1 . the sky is blue . question : the red key is"
PROMPT = " ".join([WORDS] * 8)
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": PROMPT, "max_tokens": 2},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 2,
    },
    "/v1/responses": {"model": MODEL, "input": PROMPT, "max_output_tokens": 2},
}
SCHEMAS = {
    "/v1/completions": "CompletionRequest",
    "/v1/chat/completions": "ChatCompletionRequest",
    "/v1/responses": "ResponsesRequest",
}
OURS = ("kv_budget", "kv_policy", "kv_shallow", "kv_reuse")
"""Fields that are ours, where the server has them."""

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
COPIES = ("n", "best_of")
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 39, 40, 64, 2**31, 2**63, -(2**63), 10**30),
    *(0.0, -0.0, 0.25, 1.0, 1.5, -0.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "x", "64", "none", "asl", "nonsense", "\x00", "\ud800", "é" * 50, "9" * 500),
    *([], [[]], [1], [None], ["a", 1], {}, {"a": 1}, {"": {}}, {"type": "object"}),
]


ENDINGS: list[dict[str, Any]] = [
    *({name: ["9", "7"]} for name in ("stop", "stop_sequences")),
    *({"stop": ""}, {"stop": [""]}, {"stop": "9", "n": 2, "temperature": 1}),
    *({"stop_token_ids": [9], "ignore_eos": True}, {"min_tokens": 2, "max_tokens": 2}),
    *({"use_beam_search": True, "n": 2}, {"request_id": "again"}),
]
"""Ways for a request to end, or to name itself."""


@dataclass(frozen=True)
class Case:
    """One request, ready to send."""

    path: str
    content: bytes
    content_type: str = "application/json"
    method: str = "POST"

    def shown(self) -> str:
        """Its start, for a report; the prompt left out."""
        content = self.content.replace(json.dumps(PROMPT).encode(), b"PROMPT")
        return f"{self.method} {self.path} {content[:300]!r}"


def encoded(path: str, body: Any) -> Case:
    """A body as JSON; NaN and lone surrogates go out as Python writes them."""
    return Case(path, json.dumps(body).encode())


def bounded(body: Any) -> Any:
    """The body with lengths and copies that would only take long made small.

    Values that a server must refuse stay as they are.
    """
    if not isinstance(body, dict):
        return body
    body = dict(body)
    for names, most, refused in ((LENGTHS, 4, 10**6), (COPIES, 2, 10**6)):
        for name in names:
            value = body.get(name)
            if type(value) is int and most < value < refused:
                body[name] = most
    for name in LENGTHS[:3]:
        # Left out or null it may mean as many as fit.
        if body.get(name, 1) is None:
            body[name] = 2
    body.setdefault("max_output_tokens" if "input" in body else "max_tokens", 2)
    return body


def mutated(openapi: dict[str, Any], seed: int, count: int) -> Iterator[Case]:
    """Valid bodies of which one to three fields were replaced; half of them ours."""
    rng = random.Random(f"mutated {seed}")
    fields = {
        path: sorted(openapi["components"]["schemas"][name]["properties"])
        for path, name in SCHEMAS.items()
    }
    for _ in range(count):
        path = rng.choice(list(VALID))
        body = dict(VALID[path])
        if rng.random() < 0.3:
            body |= {"stream": True}
        if rng.random() < 0.5:
            body["kv_budget"] = rng.choice(HOSTILE)
        for name in rng.sample(fields[path], rng.choice((0, 1, 1, 2, 3))):
            body[name] = rng.choice(HOSTILE)
        yield encoded(path, bounded(body))


def placed() -> Iterator[Case]:
    """Our fields where clients put them by mistake, in both places, and beside others.

    Also at the endpoints whose other fields are not varied.
    """
    chat = VALID["/v1/chat/completions"]
    paths = {
        **VALID,
        "/v1/chat/completions/batch": {**chat, "messages": [chat["messages"]] * 2},
        "/v1/messages": chat,
    }
    values: list[Any] = [None, True, 1.0, 3, 64, "64", [64], {"a": 1}]
    beside: list[dict[str, Any]] = [
        *({name: {"kv_budget": 64}} for name in ("extra_body", "extra_args")),
        *({"sampling_params": {"kv_budget": 64}}, {"kv_buget": 64}, {"kvBudget": 64}),
        *({"vllm_xargs": {"kv_budget": value}} for value in values),
        *({"kv_budget": value, "vllm_xargs": {"kv_budget": 48}} for value in values),
        *({"kv_budget": 64, **more} for more in ENDINGS),
        {"echo": True, "logprobs": 1, "max_tokens": 0, "kv_budget": 64},
        {"prompt_logprobs": 1, "kv_budget": 64},
    ]
    for path, body in paths.items():
        for fields in beside:
            for stream in (False, True):
                yield encoded(path, {**body, **fields, "stream": stream})


def raw(megabytes: int = 8) -> Iterator[Case]:
    """Bodies that are no JSON objects, oversized ones, wrong media types."""
    long = "the " * (megabytes * 250_000)
    for path, body in VALID.items():
        good = json.dumps({**body, "kv_budget": 64}).encode()
        yield from (
            Case(path, content)
            for content in (
                *(b"", b" ", b"{", b"null", b"[]", b'"x"', b"1", b"NaN", b"{}}"),
                good[:-1],
                good + b"x",
                good.replace(b"red", b"\xff\xfe", 1),
                good.replace(b"red", b"\xc3", 1),
                good.replace(b"kv_budget", b"\xff", 1),
                good.replace(b": 64", b": 064", 1),
                good.replace(b": 64", b": 1e999", 1),
                good.replace(b": 64", b": " + b"9" * 5000, 1),
                good.replace(b": 64", b': 64, "kv_budget": 65', 1),
                b"\xef\xbb\xbf" + good,
                good.decode().encode("utf-16"),
                b"[" * 100_000,
                b'{"kv_budget":' * 20_000 + b"1" + b"}" * 20_000,
                json.dumps({**body, "prompt": long}).encode(),
                json.dumps({**body, "input": long}).encode(),
                json.dumps({**body, "kv_budget": [0] * len(long)}).encode(),
                json.dumps({**body, "kv_budget": long}).encode(),
            )
        )
        for media_type in ("text/plain", "application/xml", "multipart/form-data", ""):
            yield Case(path, good, media_type)
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            yield Case(path, b"", method=method)
    for path in ("/v1/kv/policies", "/v1/kv/stats"):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            yield Case(path, b"{", method=method)
        yield Case(f"{path}?engine=%ff%00&x=" + "y" * 10_000, b"", method="GET")
