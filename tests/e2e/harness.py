"""Real vLLM engines inside the test process, where a test can look at the pool."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# In-process engine core; no network; no pinning to cores that others use too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: E402

TINY_MODEL = Path(__file__).parents[2] / "asl_vllm" / "assets" / "tiny_retriever"
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

    def held_blocks(self, request_id: str) -> int:
        """Blocks that a live request owns; null blocks are not counted."""
        (ids,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return sum(block_id != 0 for block_id in ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        budget: Any = None,
        max_tokens: int = 8,
        **sampling: Any,
    ) -> list[Any]:
        """Greedy unless told; one budget for all prompts."""
        extra = {} if budget is None else {"extra_args": {"kv_budget": budget}}
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, **extra, **sampling
        )
        return self.llm.generate(
            [{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False
        )


@contextmanager
def engine(
    model: str | Path = TINY_MODEL, *, policy: dict[str, Any] | None = None, **kw: Any
) -> Iterator[Engine]:
    """Starts an engine, with ``policy`` as asl_vllm's options where given."""
    pool_tokens = kw.pop("pool_tokens", POOL_TOKENS)
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 4096,
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 28,
        "num_gpu_blocks_override": pool_tokens // kw.get("block_size", BLOCK) + 1,
        **kw,
    }
    if policy is not None:
        options["additional_config"] = {"asl_vllm": policy}
    llm = LLM(str(model), **options)
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
