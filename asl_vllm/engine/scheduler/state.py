"""The pool and the pruned requests of an engine, as a front end may ask for them.

Touch point: a method added to ``EngineCore``, which front ends call by name in every
engine, as they call vLLM's own utilities. So each front end sees everything.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from asl_vllm.engine.messages import STATE_METHOD
from asl_vllm.engine.patching import add_method


def install() -> None:
    """Adds the method; idempotent. Called where the engine core lives."""
    add_method(EngineCore, STATE_METHOD, engine_state)


def engine_state(core: EngineCore) -> dict[str, Any]:
    """One engine's part of ``GET /v1/kv/stats`` and ``/v1/kv/policies``; plain data."""
    scheduler: Scheduler = core.scheduler
    connector: Any = scheduler.get_kv_connector()
    side = connector.scheduler_side
    pool = scheduler.kv_cache_manager.block_pool
    # Block 0 is the null block.
    total = pool.num_gpu_blocks - 1
    free = pool.get_num_free_blocks()
    return {
        # Engines that are alone in their process group carry no index.
        "index": getattr(core, "engine_index", 0),
        "pool": {
            "block_size": scheduler.block_size,
            "blocks_total": total,
            "blocks_used": total - free,
            "blocks_free": free,
            "blocks_pinned": side.prefixes.num_pinned,
            "tokens_saved": side.tokens_saved(),
            "usage": round((total - free) / total, 6),
        },
        "requests": side.pruned_requests(),
        "totals": dict(side.tally.totals),
        "num_layers": side.num_layers,
        "pool_tokens": side.pool_tokens,
        "kv_bytes_per_token": _bytes_per_token(core, scheduler),
    }


def _bytes_per_token(core: EngineCore, scheduler: Scheduler) -> int:
    """Bytes of one token's keys and values in all layers of all ranks."""
    one_rank = sum(
        group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        for group in scheduler.kv_cache_config.kv_cache_groups
    )
    ranks: int = core.vllm_config.parallel_config.tensor_parallel_size
    return one_rank * ranks // int(scheduler.block_size)
