"""Stand-ins: tokenizers without a vocabulary file, and a server that needs no model."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from asl_vllm_testing import TINY_MODEL
from benchmarks.accuracy.tasks import Sample
from benchmarks.accuracy.tasks.words import VOCABULARY


class PieceTokenizer:
    """BOS, then pieces of up to four letters or digits, blanks and signs."""

    bos: int | None = 1
    pattern = r"\w{1,4}|\W"

    def count(self, text: str) -> int:
        return len(re.findall(self.pattern, text))

    def encode(self, sample: Sample) -> list[int]:
        pieces = re.findall(self.pattern, sample.text + sample.prefix)
        return [1, *(2 + zlib.crc32(piece.encode()) % 100_000 for piece in pieces)]


class WordTokenizer(PieceTokenizer):
    """BOS, then words between blanks, as the small models' tokenizer."""

    pattern = r"\S+"


POLICIES = {
    "policies": ["none", "asl", "snapkv", "fastkv", "gemfilter", "pyramidinfer"],
    "num_layers": 10,
    "window": 8,
    "block_size": 32,
    "minimum_budget": 40,
    "config": {"window": 8, "tau": 0.3, "selection_layer": None},
}

Handle = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class FakeServer:
    """Answers needle prompts from their token ids; remembers what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict[str, Any]] = []
        self.policies: dict[str, Any] | None = POLICIES
        self.max_model_len = 4096
        self.handle: Handle = self.solve

    def solve(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The right answer, if the needle is among the tokens; layer 4, if pruned."""
        words = " ".join(VOCABULARY[i] for i in body["prompt"])
        key = words.split("question : ")[1]
        found = re.search(rf"{key} (\d \d \d \d) \.", words)
        usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"])}
        usage |= {"completion_tokens": 4, "total_tokens": 0}
        policy = body.get("kv_policy", "none")
        told = None
        if self.policies and policy != "none":
            kept, num_tokens = body["kv_budget"], len(body["prompt"])
            told = {"policy": policy}
            usage["kv_cache"] = {
                "budget_tokens": kept,
                "selection_layer": 4,
                "kept_tokens": kept,
                "pruned_tokens": num_tokens - kept,
                "skipped_token_layers": 5 * (num_tokens - kept),
            }
        return 200, completion(f" {found[1]}" if found else " no", usage, told)


def completion(
    text: str, usage: dict[str, Any], told: dict[str, Any] | None = None
) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
    head = {"id": "1", "object": "text_completion", "created": 0, "model": "tiny"}
    return {**head, "choices": [choice], "usage": usage, "kv_transfer_params": told}


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A `FakeServer` on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                model = {"id": "tiny", "object": "model", "created": 0, "owned_by": ""}
                model |= {"root": str(TINY_MODEL), "max_model_len": fake.max_model_len}
                self.reply(200, {"object": "list", "data": [model]})
            elif self.path == "/v1/kv/policies" and fake.policies:
                self.reply(200, fake.policies)
            else:
                self.reply(404, {"error": {"message": "not found"}})

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = json.loads(self.rfile.read(length))
            fake.asked.append(body)
            self.reply(*fake.handle(body))

        def reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            # The client would try again, and wait before that.
            self.send_header("x-should-retry", "false")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
