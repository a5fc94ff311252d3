"""Engines in processes of their own, one working at a time."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.load import Ask, Trace, drive


def _host(connection: Connection, model: str, options: dict[str, Any]) -> None:
    """Child process: builds an `LLM` and drives the loads that it is sent."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "additional_config" not in options:
        os.environ["VLLM_PLUGINS"] = ""  # stock: no plugin is even loaded
    from vllm import LLM

    llm = LLM(model, **options)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    connection.send(getattr(worker, "prefill_bytes", 0))
    while (order := connection.recv()) is not None:
        asks, policy, forget = order
        try:
            if policy is not None:
                _take_policy(policy)
            if forget:
                llm.reset_prefix_cache()
            connection.send(drive(llm, asks))
        except Exception:
            connection.send(traceback.format_exc())
            raise


def _take_policy(policy: dict[str, Any]) -> None:
    """Has prefills from now on follow other options than the engine's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from asl_vllm.config import AslConfig

    factory = get_kv_transfer_group().worker_side.queue._start
    # What was reserved for a chunk at the start is also the most.
    reserved = _reserved.setdefault(id(factory), factory.chunk_tokens)
    factory.config = AslConfig.from_dict(policy)
    factory.chunk_tokens = min(factory.config.chunk_tokens or reserved, reserved)


_reserved: dict[int, int] = {}
"""Tokens of a chunk that prefill factories of this process began with."""


ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}
"""glibc keeps what is freed, as the allocator does that vLLM's servers preload.

Otherwise each step faults its pages in anew, as many as the shape of a process' heap
has it: 30,000 or 51,000 for 1,024 tokens, which is 7 % of the time.
"""


class EngineProcess:
    """An engine in a child process; use as a context manager.

    ``policy`` are asl_vllm's options; None starts stock vLLM, which loads no plugin.
    """

    def __init__(
        self,
        name: str,
        model: str,
        options: dict[str, Any],
        policy: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.stock = policy is None
        if policy is not None:
            options = options | {"additional_config": {"asl_vllm": policy}}
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_host, args=(child, model, options), daemon=True
        )
        # Read by the C library before the child's first line.
        os.environ.update(ALLOCATOR)
        self._process.start()
        child.close()
        self.prefill_bytes: int = 0
        """Bytes reserved for prefills outside the KV pool; 0 for stock vLLM."""

    def wait_until_ready(self) -> None:
        """Waits until the engine has started.

        Raises:
            EOFError: it did not start; why is on the terminal.
        """
        self.prefill_bytes = self._connection.recv()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self._process.join(timeout=30)
        self._process.terminate()

    def run(
        self,
        asks: Sequence[Ask],
        policy: dict[str, Any] | None = None,
        *,
        forget: bool = False,
    ) -> Trace:
        """Drives a load, by other options of asl_vllm than its own where given.

        ``forget`` empties the prefix cache first.

        Raises:
            RuntimeError: the engine failed; the message is its traceback.
        """
        self._connection.send((list(asks), policy, forget))
        trace = self._connection.recv()
        if not isinstance(trace, Trace):
            raise RuntimeError(f"engine {self.name} failed:\n{trace}")
        return trace


class Variant:
    """An engine as it is under one of the policies that it serves in turn."""

    stock = False

    def __init__(self, name: str, host: EngineProcess, policy: dict[str, Any]) -> None:
        self.name = name
        self.prefill_bytes = host.prefill_bytes
        self._host, self._policy = host, policy

    def run(self, asks: Sequence[Ask], *, forget: bool = False) -> Trace:
        """Drives a load under this policy; see `EngineProcess.run`."""
        named = [
            ask if ask.budget is None else replace(ask, policy=self._policy["policy"])
            for ask in asks
        ]
        return self._host.run(named, self._policy, forget=forget)


class Forgetful:
    """An engine whose prefix cache is emptied before each load."""

    def __init__(self, engine: EngineProcess | Variant) -> None:
        self.name, self.stock = engine.name, engine.stock
        self.prefill_bytes: int = engine.prefill_bytes
        self._engine = engine

    def run(self, asks: Sequence[Ask]) -> Trace:
        """Drives a load; see `EngineProcess.run`."""
        return self._engine.run(asks, forget=True)


Measured = EngineProcess | Variant | Forgetful
