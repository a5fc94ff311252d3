"""How large the benchmarks are: model shapes, prompt lengths, rounds.

``LAYER_BOUND`` spends its time in matrix products, as large models do on prompts of
moderate length; ``LONG`` is small enough to prefill very long prompts;
``ATTENTION_BOUND`` has wide keys and thin layers, so that a decode step spends its time
reading the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Shape = dict[str, Any]
"""Arguments of `write_random_model`."""

LAYER_BOUND: Shape = {
    "layers": 8,
    "hidden": 512,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate": 1536,
}
LONG: Shape = LAYER_BOUND | {"layers": 4, "hidden": 256, "intermediate": 768}
ATTENTION_BOUND: Shape = {
    "layers": 4,
    "hidden": 128,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate": 256,
}


@dataclass(frozen=True)
class Scale:
    """Sizes of one run of all experiments."""

    rounds: int
    prefill_tokens: tuple[int, ...]
    """Prompt lengths of the time to first token."""
    growth_tokens: tuple[int, ...]
    """Prompt lengths of the growth of cost."""
    decode_contexts: tuple[int, ...]
    decode_batches: tuple[int, ...]
    decode_steps: int
    capacity_tokens: int
    capacity_requests: int
    neighbour_tokens: int
    overlong_tokens: int
    """Length of the prompt that the pool holds a quarter of."""
    budget: int
    layer_bound: Shape
    long: Shape
    attention_bound: Shape
    depths: tuple[float, ...] = (1 / 4, 1 / 2, 3 / 4)
    """Selection layers of the time to first token, as shares of the layers."""
    short_requests: int = 64
    prefix_tokens: int = 2048
    """Length of the prompts whose beginning is cached."""
    prefix_budget: int = 512
    document_tokens: int = 16384
    """Length of a cached document that several questions are asked about."""
    answer_tokens: int = 200
    """Of each answer to them."""
    most_pool_tokens: int | None = None
    """Tokens of the largest KV pool that there is memory for."""


FULL = Scale(
    rounds=7,
    prefill_tokens=(512, 2048, 8192),
    growth_tokens=(1024, 4096, 16384, 65536),
    decode_contexts=(4096, 16384),
    decode_batches=(1, 4),
    decode_steps=48,
    capacity_tokens=8192,
    capacity_requests=16,
    neighbour_tokens=32768,
    overlong_tokens=16384,
    budget=1024,
    layer_bound=LAYER_BOUND,
    long=LONG,
    attention_bound=ATTENTION_BOUND,
)
QUICK = Scale(
    rounds=1,
    prefill_tokens=(512, 1024),
    growth_tokens=(1024, 2048),
    decode_contexts=(1024,),
    decode_batches=(1, 2),
    decode_steps=16,
    capacity_tokens=1024,
    capacity_requests=8,
    neighbour_tokens=2048,
    overlong_tokens=2048,
    budget=256,
    short_requests=8,
    prefix_tokens=512,
    prefix_budget=128,
    document_tokens=1024,
    answer_tokens=20,
    layer_bound=LAYER_BOUND,
    long=LONG,
    attention_bound=ATTENTION_BOUND,
)
