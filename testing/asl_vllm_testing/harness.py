"""Real vLLM engines inside the test process, where a test can look at the pool."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group

from asl_vllm_testing import TINY_MODEL

BLOCK = 32
POOL_TOKENS = 16384


class Engine:
    """An `LLM` and the insides that invariants are read from."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        self.scheduler: Any = core.scheduler
        self.pool: Any = self.scheduler.kv_cache_manager.block_pool
        self.start_free = self.free_blocks

    @property
    def free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def queue(self) -> Any:
        """The worker's `PrefillQueue` (policy on, one rank)."""
        return get_kv_transfer_group().worker_side.queue

    @property
    def factory(self) -> Any:
        return self.queue._start

    def check(self) -> None:
        """The block manager's state is whole; nothing is left where all is done."""
        # Not at the top: a stock engine's process imports nothing of asl_vllm.
        from asl_vllm.engine.scheduler.integrity import check_integrity

        idle = not self.scheduler.has_requests()
        check_integrity(self.scheduler.kv_cache_manager, idle=idle)

    def held_blocks(self, request_id: str) -> int:
        """Blocks that a live request owns; null blocks are not counted."""
        (ids,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return sum(block_id != 0 for block_id in ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        budget: Any = None,
        policy: Any = None,
        reuse: Any = None,
        salt: str | None = None,
        max_tokens: int = 8,
        **sampling: Any,
    ) -> list[Any]:
        """Greedy unless told; one budget and one policy for all prompts."""
        asked = {"kv_budget": budget, "kv_policy": policy, "kv_reuse": reuse}
        given = {name: value for name, value in asked.items() if value is not None}
        extra = {"extra_args": given} if given else {}
        salted = {} if salt is None else {"cache_salt": salt}
        params = SamplingParams(
            **{"temperature": 0, "max_tokens": max_tokens, **extra, **sampling}
        )
        return self.llm.generate(
            [{"prompt_token_ids": list(p), **salted} for p in prompts],
            params,
            use_tqdm=False,
        )


@contextmanager
def _garbage_is_left() -> Iterator[None]:
    """vLLM collects it eight times around an engine, at half a second each."""
    with patch.object(gc, "collect", lambda *_: 0):
        yield


LIVE: list[Engine] = []
"""Engines that run now; each is checked after each test (conftest.py)."""


@contextmanager
def engine(
    model: str | Path = TINY_MODEL, *, policy: dict[str, Any] | None = None, **kw: Any
) -> Iterator[Engine]:
    """Starts an engine, with ``policy`` as asl_vllm's options where given.

    Its blocks are checked after each test and at its end.
    """
    pool_tokens = kw.pop("pool_tokens", POOL_TOKENS)
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 4096,
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 28,
        "num_gpu_blocks_override": pool_tokens // (kw.get("block_size") or BLOCK) + 1,
        **kw,
    }
    if policy is not None:
        options["additional_config"] = {"asl_vllm": policy}
    with _garbage_is_left():
        llm = LLM(str(model), **options)
    host = Engine(llm)
    LIVE.append(host)
    try:
        yield host
        if policy is not None:
            host.check()
    finally:
        LIVE.remove(host)
        with _garbage_is_left():
            llm.llm_engine.engine_core.shutdown()
        del llm, host
        gc.collect()
        with _garbage_is_left():
            cleanup_dist_env_and_memory()


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of the random model; they differ by seed."""
    rng = random.Random(seed)
    return [rng.randrange(4, 512) for _ in range(num_tokens)]


class Running:
    """One request that a test steps by hand."""

    def __init__(self, host: Engine, request_id: str) -> None:
        self._host = host
        self.external_id = request_id
        matches = [r for r in host.scheduler.requests if r.startswith(request_id)]
        (self.request_id,) = matches
        self.output: Any = None

    @property
    def finished(self) -> bool:
        return self.output is not None and self.output.finished

    @property
    def tokens(self) -> list[int]:
        """Generated so far; there must be an output."""
        return list(self.output.outputs[0].token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.output.outputs[0].token_ids) if self.output else 0

    @property
    def held_blocks(self) -> int:
        return self._host.held_blocks(self.request_id)


def add(
    host: Engine,
    request_id: str,
    prompt: Sequence[int],
    *,
    budget: Any = None,
    max_tokens: int = 8,
    stop: str | None = None,
    **fields: Any,
) -> Running:
    """Adds a greedy request that ignores end-of-text; `step` runs it.

    ``stop`` is text that ends it. ``fields`` are others of ours than ``kv_budget``, by
    their names.
    """
    given = {"kv_budget": budget, **fields}
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        stop=stop,
        extra_args={name: value for name, value in given.items() if value is not None},
    )
    host.llm.llm_engine.add_request(
        request_id, {"prompt_token_ids": list(prompt)}, params
    )
    return Running(host, request_id)


def step(host: Engine, *requests: Running) -> None:
    """One engine step; each request's ``output`` becomes its newest."""
    for output in host.llm.llm_engine.step():
        for request in requests:
            if output.request_id == request.external_id:
                request.output = output


def run_to_end(host: Engine, *requests: Running, limit: int = 3000) -> None:
    """Steps until all have finished; a stuck request fails the test."""
    for _ in range(limit):
        if all(request.finished for request in requests):
            return
        step(host, *requests)
    raise AssertionError(f"stuck after {limit} steps")


def drain(host: Engine, limit: int = 200) -> None:
    """Steps until the engine has nothing left to do, aborted requests included."""
    for _ in range(limit):
        if not host.scheduler.has_requests():
            return
        host.llm.llm_engine.step()
    raise AssertionError(f"engine still busy after {limit} steps")


def assert_pool_whole(host: Engine) -> None:
    """Every block free again, and each of them once."""
    assert host.free_blocks == host.start_free
    free = [b.block_id for b in host.pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == len(set(free)) == host.start_free
    assert all(b.ref_cnt == 0 for b in host.pool.blocks if not b.is_null)
    assert not host.scheduler.requests
