"""A real ``vllm serve`` process on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from tests.e2e.harness import TINY_MODEL

MODEL_NAME = "tiny"


class Server:
    """Base URL, an HTTP client and an official OpenAI client of a live server."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.log = log
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL_NAME, **body})


@contextmanager
def serve(log: Path, *options: str, **env: str) -> Iterator[Server]:
    """Starts a server with ``options`` on the shipped model; stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TINY_MODEL)),
        *("--served-model-name", MODEL_NAME, "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-model-len", "4096", "--block-size", "32", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(1 << 27)),
        *options,
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    server = Server(port, process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(server: Server, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if server.http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"server did not start:\n{server.log.read_text()[-4000:]}")
