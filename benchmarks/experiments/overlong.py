"""A prompt longer than the whole KV pool.

Stock vLLM does not start with such a pool: a quarter of the prompt, and room for a
short answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import Ask, random_prompt

COLUMNS = ("tokens", "pool_tokens", "budget", "held_tokens", "first_token_s", "step_ms")
BLOCK_SIZE = 32
OUTPUT_TOKENS = 16


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields one row."""
    scale, shape = bench.scale, bench.scale.long
    num_tokens = scale.overlong_tokens
    pool_tokens = num_tokens // 4
    policy = {"policy": "asl", "selection_layer": shape["layers"] // 2 - 1}
    with bench.engines(
        shape,
        {"asl": policy},
        max_model_len=num_tokens + OUTPUT_TOKENS,
        pool_tokens=pool_tokens,
        block_size=BLOCK_SIZE,
        stock=False,
    ) as (engine,):
        # The first prefill of a process pays for what later ones find.
        engine.run([Ask(random_prompt(2 * scale.budget, 1), 4, scale.budget)])
        ask = Ask(random_prompt(num_tokens, 0), OUTPUT_TOKENS, scale.budget)
        trace = engine.run([ask])
        (answer,) = trace.answers
        gaps = answer.gaps(0.0, float("inf"))
        yield {
            "tokens": num_tokens,
            "pool_tokens": pool_tokens,
            "budget": scale.budget,
            "held_tokens": trace.peak_blocks * BLOCK_SIZE,
            "first_token_s": answer.first_token_s,
            "step_ms": sum(gaps) / len(gaps) * 1e3,
        }
