"""Engines in processes of their own, timed in turn against each other.

Only one engine works at a time; a round times each of them once, so a machine that
slows down slows all of them. Ratios are taken round by round.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any


def _host(connection: Connection, model: str, options: dict[str, Any]) -> None:
    """Child process: builds an `LLM` and times what it is told to generate."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "additional_config" not in options:
        os.environ["VLLM_PLUGINS"] = ""  # stock: no plugin is even loaded
    from vllm import LLM, SamplingParams

    llm = LLM(model, **options)
    connection.send("ready")
    while (order := connection.recv()) is not None:
        prompts, max_tokens, budget = order
        extra = {"kv_budget": budget} if budget is not None else None
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        connection.send((seconds, outputs[0].kv_transfer_params))


class EngineProcess:
    """An engine in a child process; use as a context manager."""

    def __init__(self, name: str, model: str, options: dict[str, Any]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_host, args=(child, model, options), daemon=True
        )
        self._process.start()
        child.close()
        self._connection.recv()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.send(None)
        self._process.join(timeout=30)
        self._process.terminate()

    def time(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 1,
        budget: int | None = None,
    ) -> tuple[float, dict[str, Any] | None]:
        """Seconds to answer all, and the first reply's ``kv_transfer_params``."""
        self._connection.send(([list(p) for p in prompts], max_tokens, budget))
        seconds, params = self._connection.recv()
        return seconds, params


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two engines' times."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))
