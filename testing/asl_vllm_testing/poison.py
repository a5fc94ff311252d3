"""Memory that nobody owns, filled so that whoever reads it is found out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from asl_vllm.prefill import PrefillJob
from asl_vllm_testing.harness import Engine

HUGE = 1e4
"""Far beyond any key or value of the small models, and its products are finite."""


def prefill_memory(host: Engine) -> dict[str, torch.Tensor]:
    """The tensors reserved at start-up for prefills, by name."""
    factory = host.factory
    buffers = factory.buffers
    owners = {
        "buffers": buffers,
        "hidden": buffers.hidden,
        "scratch": factory.model._scratch,
    }
    return {
        f"{name}.{key}": value
        for name, owner in owners.items()
        for key, value in vars(owner).items()
        if isinstance(value, torch.Tensor)
    }


def pool_memory(host: Engine) -> list[torch.Tensor]:
    """The KV pool, a tensor a layer, block ids along the first dimension."""
    return [attention.kv_cache for attention in host.factory.model._attentions]


def poison_unowned(host: Engine) -> int:
    """Overwrites the blocks that are free and not in the prefix cache; how many."""
    free = [
        block.block_id
        for block in host.pool.blocks
        if block.ref_cnt == 0 and block.block_hash is None and not block.is_null
    ]
    for cache in pool_memory(host):
        assert cache.shape[0] == host.pool.num_gpu_blocks
        cache[free] = HUGE
    return len(free)


@contextmanager
def poisoned_prefills(host: Engine) -> Iterator[None]:
    """Each prefill finds its memory full of what no prompt left there."""
    kind: Any = type(host.factory)
    start = kind.__call__
    memory = [t for t in prefill_memory(host).values() if t.is_floating_point()]

    def poison_and_start(self: Any, job: PrefillJob) -> Any:
        for tensor in memory:
            tensor.fill_(HUGE)
        return start(self, job)

    kind.__call__ = poison_and_start
    try:
        yield
    finally:
        kind.__call__ = start
