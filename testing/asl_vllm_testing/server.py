"""A real server process on a free port."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from asl_vllm_testing import TINY_MODEL, warm

MODEL_NAME = "tiny"
VLLM_SERVE = ("vllm.entrypoints.cli.main", "serve")
ASL_SERVER = ("asl_server",)
"""The two ways to start a server, as arguments of ``python -m``."""


class Server:
    """Base URL, an HTTP client and an official OpenAI client of a live server."""

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[bytes] | warm.Process,
        log: Path,
        key: str,
        authority: Path | None,
    ) -> None:
        self.url = url
        self.process = process
        self.log = log
        self._key = key
        self._tls = ssl.create_default_context(cafile=authority) if authority else True
        self.http = self.connect()
        self.openai = OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx.Client(verify=self._tls, timeout=120),
        )

    def connect(self) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(
            base_url=self.url,
            timeout=120,
            verify=self._tls,
            headers={"authorization": f"Bearer {self._key}"},
        )

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL_NAME, **body})


@contextmanager
def serve(
    log: Path,
    *options: str,
    module: tuple[str, ...] = VLLM_SERVE,
    key: str = "none",
    certificate: tuple[Path, Path] | None = None,
    **env: str,
) -> Iterator[Server]:
    """Starts a server with ``options`` on the tiny model; stops it at the end.

    ``key`` is what clients send; ``certificate`` (key file, certificate file) makes
    it an HTTPS server.
    """
    command = [
        *(sys.executable, "-m", *module, str(TINY_MODEL)),
        *("--served-model-name", MODEL_NAME, "--dtype", "float32"),
        "--enforce-eager",
        *("--max-model-len", "4096", "--block-size", "32", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(1 << 27)),
        *options,
    ]
    if certificate:
        command += ["--ssl-keyfile", str(certificate[0])]
        command += ["--ssl-certfile", str(certificate[1])]
    with serve_command(command, log, key=key, certificate=certificate, **env) as server:
        yield server


@contextmanager
def serve_command(
    command: Sequence[str],
    log: Path,
    *,
    key: str = "none",
    certificate: tuple[Path, Path] | None = None,
    cwd: Path | None = None,
    **env: str,
) -> Iterator[Server]:
    """Starts a server by ``command``, to which a free port is added; see `serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
    process: subprocess.Popen[bytes] | warm.Process
    with log.open("wb") as sink:
        if cwd is None and warm.can_run(command, env):
            process = warm.start(command, sink, environment)
        else:
            process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
    scheme, authority = ("https", certificate[1]) if certificate else ("http", None)
    server = Server(f"{scheme}://127.0.0.1:{port}", process, log, key, authority)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(server: Server, seconds: float = 300) -> None:
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
