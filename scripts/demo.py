#!/usr/bin/env python3
"""Serves a small model with ``--kv-policy asl`` and asks it one question.

Run by ``make demo``. The prompt holds about 2,000 tokens and one fact. It is sent
over HTTP with the official client several times, each time with another
``kv_budget``, and a table shows the answer and how much of the KV cache was held.
Ends with status 0 only if every answer is right and a budget that is too small is
refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

MODEL = Path(__file__).resolve().parent.parent / "examples/deep_retriever"
BLOCK_SIZE = 32

# The method's, but for a shorter window: a budget of 128 would be a quarter window.
POLICY_CONFIG: Mapping[str, int | float] = {"window": 8}

BUDGETS: tuple[int | None, ...] = (None, 512, 128)
# The window and one block, 8 + 32, is the least that can be kept.
REFUSED_BUDGET = 16

# Words of the model's vocabulary; its tokenizer makes one token of each word.
FILLER = (
    "the grass is green .",
    "the sky is blue .",
    "the sun is yellow .",
    "here we go .",
    "there and back again .",
)
FACT = "the red key is 7 3 9 1 ."
QUESTION = "question : the red key is"
ANSWER = "7 3 9 1"
ROUNDS = 83  # of 24 words of filler

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0

# What a line of the server's log tells of its progress, in order.
STAGES = (
    (re.compile(r"Resolved architecture"), "reading the model's configuration"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine"),
    (re.compile(r"Starting to load model"), "loading the model"),
    (re.compile(r"KV cache size: ([\d,]+ tokens)"), "sizing the KV pool"),
    (re.compile(r"Starting vLLM server"), "opening the port"),
)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


# --- The question and the table --------------------------------------------------


def build_prompt(rounds: int = ROUNDS, first: int = 0) -> str:
    """Filler that begins with its sentence `first`, the fact midway, the question."""
    filler = [*FILLER[first:], *FILLER[:first]]
    before = rounds // 2
    return " ".join(
        [*filler * before, FACT, *filler * (rounds - before), QUESTION],
    )


def is_right(text: str) -> bool:
    """Whether a completion begins with the answer."""
    words = ANSWER.split()
    return text.split()[: len(words)] == words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One request and what came of it."""

    budget: int | None
    text: str
    prompt_tokens: int
    report: Mapping[str, Any] | None
    """The reply's ``usage.kv_cache``; None if nothing was pruned."""
    milliseconds: float

    @property
    def blocks_held(self) -> int:
        """KV blocks the prompt holds, per layer."""
        blocks = -(-self.prompt_tokens // BLOCK_SIZE)
        return blocks - (self.report["freed_blocks"] if self.report else 0)

    @property
    def tokens_kept(self) -> int:
        """Prompt tokens whose keys and values are kept, per layer."""
        return self.report["kept_tokens"] if self.report else self.prompt_tokens

    @property
    def selection_layer(self) -> str:
        """The layer after which only the kept tokens went on."""
        if self.report is None:
            return "-"
        return str(self.report.get("selection_layer", "none"))

    @property
    def as_expected(self) -> bool:
        """Whether the answer is right and the prompt pruned if it was to be."""
        pruned = self.report is not None
        return is_right(self.text) and pruned == (self.budget is not None)

    def cells(self) -> list[str]:
        """The row as text, one item for each of `HEADINGS`."""
        return [
            "null" if self.budget is None else str(self.budget),
            self.text.strip(),
            "yes" if is_right(self.text) else "NO",
            str(self.blocks_held),
            str(self.tokens_kept),
            self.selection_layer,
            f"{self.milliseconds:.0f}",
        ]


HEADINGS = (
    "kv_budget",
    "answer",
    "right?",
    "KV blocks held",
    "tokens kept",
    "selection layer",
    "time ms",
)


def render_table(rows: Sequence[Row]) -> str:
    """The rows under `HEADINGS`, in columns."""
    lines = [list(HEADINGS), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        " | ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


# --- The server ------------------------------------------------------------------


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve_command(port: int) -> list[str]:
    """The command line of ``vllm serve``."""
    return [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(MODEL),
        *("--served-model-name", "small"),
        *("--kv-policy", "asl"),
        *("--kv-policy-config", json.dumps(POLICY_CONFIG)),
        # Without AVX-512 a CPU emulates bfloat16; FlashAttention takes no float32.
        *("--dtype", "float32" if is_cpu_build() else "bfloat16"),
        *("--max-model-len", "4096"),
        *("--block-size", str(BLOCK_SIZE)),
        "--enforce-eager",  # starts sooner
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]


def serve_environment(environ: Mapping[str, str], cpu_build: bool) -> dict[str, str]:
    """Variables for the server; those that are set already stay."""
    defaults = {
        "HF_HUB_OFFLINE": "1",  # the model is in the repository
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",  # `STAGES` are read from the log
    }
    if cpu_build:
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, plenty here
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # shares its cores
    return {**defaults, **environ}


def is_cpu_build() -> bool:
    """Whether the vLLM installed is the one for machines without a GPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Progress:
    """A line that ticks on a terminal; elsewhere, a line for each new stage."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stage = "starting the server"
        self._printed = ""
        self._terminal = sys.stdout.isatty()

    def read(self, log_text: str) -> None:
        """Takes the stage from new text of the log, if it tells one."""
        for line in log_text.splitlines():
            for pattern, stage in STAGES:
                found = pattern.search(line)
                if found:
                    self._stage = ": ".join([stage, *found.groups()])

    def tick(self, stage: str | None = None) -> None:
        """Shows the stage and the seconds so far."""
        self._stage = stage or self._stage
        line = f"  {time.monotonic() - self._started:4.0f} s  {self._stage}"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", flush=True)
        elif self._stage != self._printed:
            print(line, flush=True)
        self._printed = self._stage

    def close(self) -> None:
        """Leaves the ticking line."""
        if self._terminal:
            print()


class Server:
    """A server process that is up inside a ``with`` block and gone after it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], url: str):
        self._command = list(command)
        self._env = dict(env)
        self._health = f"{url}/health"
        # Not through a proxy that the environment may name.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()
        # A process group of its own: Ctrl-C reaches only us, and whatever the server
        # starts can be ended with it.
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def log_tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self._read_log().decode(errors="replace").splitlines()[-40:])

    def _read_log(self, start: int = 0) -> bytes:
        # pread, since the server writes at the offset it shares with us.
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size - start, start)

    def _wait_until_ready(self) -> None:
        progress = Progress()
        deadline = time.monotonic() + START_TIMEOUT_S
        seen = 0
        try:
            while not self._healthy():
                news = self._read_log(seen)
                # Whole lines only; the rest is read next time.
                news = news[: news.rfind(b"\n") + 1]
                seen += len(news)
                progress.read(news.decode(errors="replace"))
                progress.tick()
                status = self._process.poll()
                if status is not None:
                    raise DemoError(
                        f"{self.log_tail()}\nThe server ended with status {status}; "
                        "the end of its log is above."
                    )
                if time.monotonic() > deadline:
                    raise DemoError(
                        f"{self.log_tail()}\nThe server was not ready in "
                        f"{START_TIMEOUT_S:.0f} s; the end of its log is above."
                    )
                time.sleep(0.25)
            progress.tick("ready")
        finally:
            progress.close()

    def _healthy(self) -> bool:
        try:
            with self._opener.open(self._health, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:  # includes urllib's errors
            return False

    def _stop(self) -> None:
        process = self._process
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        finally:
            # Also what it left behind: the engine is a process of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._log.close()


# --- The demo --------------------------------------------------------------------


def ask(client: Any, prompt: str, budget: int | None) -> Row:
    """Sends the prompt with a budget; raises the client's errors."""
    started = time.perf_counter()
    reply = client.completions.create(
        model="small",
        prompt=prompt,
        temperature=0,
        max_tokens=6,
        extra_body={"kv_budget": budget},
    )
    elapsed = time.perf_counter() - started
    report = (reply.usage.model_extra or {}).get("kv_cache")
    return Row(
        budget=budget,
        text=reply.choices[0].text,
        prompt_tokens=reply.usage.prompt_tokens,
        report=report if report and report["pruned_tokens"] else None,
        milliseconds=elapsed * 1000,
    )


@contextlib.contextmanager
def client_of(url: str, timeout_s: float) -> Iterator[Any]:
    """The official client, whose errors end the demo."""
    import openai  # takes seconds, so only once it is needed

    try:
        yield openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=timeout_s,
            http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy
        )
    except openai.OpenAIError as error:
        raise DemoError(f"A request failed: {error}") from error


def ask_all(url: str) -> bool:
    """Asks with every budget and prints what came back; whether all was right."""
    with client_of(url, 300) as client:
        return _ask_all(client)


def _ask_all(client: Any) -> bool:
    import openai

    print("Warming up: one request with a budget and one without, on another prompt,")
    print("so that the times below are comparable.")
    for budget in (BUDGETS[-1], None):
        ask(client, build_prompt(first=1), budget)

    rows = [ask(client, build_prompt(), budget) for budget in BUDGETS]
    print(f"\nThe prompt, {rows[0].prompt_tokens} tokens: ... {FACT} ... {QUESTION}\n")
    print(render_table(rows))
    if any(row.report and row.selection_layer == "none" for row in rows):
        print(
            "Selection layer none: the layers did not come to agree on the tokens, so "
            "each\nkept its own; that frees as much of the cache but saves no prefill."
        )

    print(f"\nkv_budget {REFUSED_BUDGET} is below the minimum:")
    try:
        ask(client, build_prompt(), REFUSED_BUDGET)
    except openai.BadRequestError as error:
        body = error.body if isinstance(error.body, dict) else {}
        print(f"  {error.status_code}: {body.get('message', error.message)}")
        refused = True
    else:
        print("  NOT refused, as it should have been")
        refused = False
    return refused and all(row.as_expected for row in rows)


def serve_and_ask(
    command: Sequence[str], url: str, ask_all: Callable[[str], bool]
) -> bool:
    """What ``ask_all`` says of the server at ``url``, which is up for as long."""
    env = serve_environment(os.environ, is_cpu_build())
    with Server(command, env, url) as server:
        try:
            return ask_all(url)
        except DemoError as error:
            raise DemoError(f"{server.log_tail()}\n{error}") from error


def end_of(run: Callable[[], bool], good: str, bad: str) -> int:
    """Runs a demo and prints which of the two it came to; the exit status."""
    # As Ctrl-C does: end through the `finally` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        ok = run()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{good if ok else bad}")
    return 0 if ok else 1


def run() -> bool:
    """Serves the small model and asks it; whether all was right."""
    port = free_port()
    print(f"Starting: vllm serve {MODEL.name} --kv-policy asl ...", flush=True)
    return serve_and_ask(serve_command(port), f"http://127.0.0.1:{port}", ask_all)


def main() -> int:
    """Runs the demo; the exit status."""
    return end_of(run, "All as expected.", "NOT as expected; see above.")


if __name__ == "__main__":
    sys.exit(main())
