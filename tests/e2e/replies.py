"""Requests to each API, and what their replies should say of a pruned prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from asl_vllm_testing.oracle.tasks import needle

QUESTION = needle(7, 600)
OTHER = needle(9, 300)
BUDGET = 128
KEPT = 600 - 480
"""The largest number of at most 128 for which whole blocks of 600 tokens are freed."""
REPORT = {
    "policy": "asl",
    "budget_tokens": BUDGET,
    "selection_layer": 4,
    "kept_tokens": KEPT,
    "pruned_tokens": 480,
    "freed_blocks": 15,
    "skipped_token_layers": 480 * 5,
    "reused_tokens": 0,
    "reused_token_layers": 0,
    "rerun_token_layers": 0,
    "filled_tokens": 0,
    "shared_prefills": 0,
}
UNPRUNED = {
    "policy": "asl",
    "budget_tokens": 1000,
    "selection_layer": None,
    "kept_tokens": 600,
    "pruned_tokens": 0,
    "freed_blocks": 0,
    "skipped_token_layers": 0,
    "reused_tokens": 0,
    "reused_token_layers": 0,
    "rerun_token_layers": 0,
    "filled_tokens": 0,
    "shared_prefills": 0,
}
HEADERS = {
    "x-kv-policy": "policy",
    "x-kv-selection-layer": "selection_layer",
    "x-kv-kept-tokens": "kept_tokens",
    "x-kv-pruned-tokens": "pruned_tokens",
    "x-kv-reused-tokens": "reused_tokens",
}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
PATHS = [COMPLETIONS, CHAT, RESPONSES]


def body(path: str, text: str = QUESTION.text, **more: Any) -> dict[str, Any]:
    """A short greedy request; a chat's template leaves BOS to the text."""
    if path in (CHAT, MESSAGES):
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    else:
        asked = {"prompt" if path == COMPLETIONS else "input": text}
    length = "max_output_tokens" if path == RESPONSES else "max_tokens"
    return {"temperature": 0, length: 4, **asked, **more}


def for_chat(report: dict[str, Any], path: str) -> dict[str, Any]:
    """The chat prompt is a token shorter, and so is what is kept of it."""
    kept = report["kept_tokens"] - (path in (CHAT, MESSAGES))
    return {**report, "kept_tokens": kept}


def numbers(report: dict[str, Any]) -> dict[str, int]:
    """What ``usage`` has of it: clients add that up."""
    return {k: v for k, v in report.items() if type(v) is int}


def kv_headers(response: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in response.headers.items() if k.startswith("x-kv")}


def as_headers(report: dict[str, Any]) -> dict[str, str]:
    shown = {name: report[key] for name, key in HEADERS.items()}
    return {name: str(v) for name, v in shown.items() if v is not None}


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def stats(client: httpx.Client) -> dict[str, Any]:
    reply: dict[str, Any] = client.get("/v1/kv/stats").json()
    return reply


@dataclass
class Answer:
    """What clients read of a reply, streamed or not."""

    text: str
    ended: Any
    """The finish reason of the first choice, by the name that the API has for it."""
    usage: dict[str, Any]
    told: list[dict[str, Any]]
    """``kv_transfer_params``, where the API has them."""

    @property
    def words(self) -> list[str]:
        return self.text.split()


def answer(path: str, response: httpx.Response) -> Answer:
    """Reads the reply of any of the four APIs; a stream must have asked for usage."""
    assert response.status_code == 200, response.text
    streamed = response.headers["content-type"].startswith("text/event-stream")
    if path in (COMPLETIONS, CHAT):
        return _of_choices(events(response.text) if streamed else [response.json()])
    if path == RESPONSES:
        reply = events(response.text)[-1]["response"] if streamed else response.json()
        text = "".join(
            part["text"] for said in reply["output"] for part in said["content"]
        )
        ended = (reply["status"], reply["incomplete_details"])
        return Answer(text, ended, reply["usage"], _told([reply]))
    if not streamed:
        reply = response.json()
        ended = (reply["stop_reason"], reply.get("stop_sequence"))
        return Answer(reply["content"][0]["text"], ended, reply["usage"], [])
    chunks = events(response.text)
    deltas = [e["delta"] for e in chunks if e["type"] == "content_block_delta"]
    (last,) = (event for event in chunks if event["type"] == "message_delta")
    ended = (last["delta"]["stop_reason"], last["delta"].get("stop_sequence"))
    text = "".join(delta["text"] for delta in deltas)
    return Answer(text, ended, last["usage"], [])


def _of_choices(parts: list[dict[str, Any]]) -> Answer:
    """Of bodies, or of chunks."""
    choices = [choice for part in parts for choice in part["choices"]]
    (ended,) = (c["finish_reason"] for c in choices if c["finish_reason"])
    text = "".join(
        choice["text"]
        if "text" in choice
        else choice.get("message", choice.get("delta"))["content"] or ""
        for choice in choices
    )
    return Answer(text, ended, parts[-1]["usage"], _told([*parts, *choices]))


def _told(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        part["kv_transfer_params"] for part in parts if part.get("kv_transfer_params")
    ]
