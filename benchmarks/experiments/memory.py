"""Peak memory of a prompt's prefill.

Bytes of the KV pool held at once, and what asl_vllm reserves outside it, for a prompt
of the longest length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import Ask, random_prompt
from benchmarks.scale import Shape

COLUMNS = ("tokens", "engine", "pool_mib", "reserved_mib", "bytes_per_token")
BLOCK_SIZE = 32


def block_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of a block in all layers, keys and values."""
    width = 2 * shape["kv_heads"] * shape["head_dim"] * itemsize
    return int(BLOCK_SIZE * shape["layers"] * width)


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row an engine."""
    scale, shape = bench.scale, bench.scale.layer_bound
    num_tokens = max(scale.prefill_tokens)
    itemsize = 4 if bench.dtype == "float32" else 2
    policies = {
        "asl": {
            "policy": "asl",
            "selection_layer": shape["layers"] // 2 - 1,
            "max_prefill_tokens": num_tokens,
        }
    }
    with bench.engines(
        shape,
        policies,
        max_model_len=num_tokens + 64,
        pool_tokens=num_tokens + 2048,
        block_size=BLOCK_SIZE,
    ) as engines:
        for engine in engines:
            budget = None if engine.stock else scale.budget
            trace = engine.run([Ask(random_prompt(num_tokens, 0), 2, budget)])
            held = trace.peak_blocks * block_bytes(shape, itemsize)
            yield {
                "tokens": num_tokens,
                "engine": engine.name,
                "pool_mib": held / 2**20,
                "reserved_mib": engine.prefill_bytes / 2**20,
                "bytes_per_token": (held + engine.prefill_bytes) / num_tokens,
            }
