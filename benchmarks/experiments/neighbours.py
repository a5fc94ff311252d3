"""Inter-token latency of others while a long prompt is prefilled.

Four requests decode; a long prompt comes. The gaps between their tokens until its first
token, beside stock vLLM's chunked prefill of the same prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import Ask, random_prompt

COLUMNS = (
    "tokens",
    "engine",
    "first_token_s",
    "p50_ms",
    "p99_ms",
    "max_ms",
    "tokens_s",
)
NEIGHBOURS = 4
SETTLED_TOKENS = 4
"""Tokens that each neighbour has before the long prompt comes."""


def percentile(values: list[float], percent: int) -> float:
    """The value below which ``percent`` of the values lie."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row an engine."""
    scale = bench.scale
    num_tokens = scale.neighbour_tokens
    policies = {
        "snapkv": {"policy": "snapkv"},
        "asl": {"policy": "asl", "selection_layer": scale.long["layers"] // 2 - 1},
    }
    # Enough to last through the prefill; what is left over costs little.
    lasting = 8 * num_tokens // bench.step_tokens + 64
    with bench.engines(
        scale.long,
        policies,
        max_model_len=num_tokens + 512,
        pool_tokens=num_tokens + 8192,
    ) as engines:
        for engine in engines:
            asks = [Ask(random_prompt(128, i), lasting) for i in range(NEIGHBOURS)]
            budget = None if engine.stock else scale.budget
            # The first prefill of a process pays for what later ones find.
            engine.run([Ask(random_prompt(2 * scale.budget, 99), 4, budget)])
            long = random_prompt(num_tokens, NEIGHBOURS)
            asks.append(Ask(long, 1, budget, after_tokens=SETTLED_TOKENS))
            *others, answer = engine.run(asks).answers
            begin, end = answer.sent, answer.token_times[0]
            assert all(other.token_times[-1] > end for other in others)
            gaps = [gap for other in others for gap in other.gaps(begin, end)]
            yield {
                "tokens": num_tokens,
                "engine": engine.name,
                "first_token_s": answer.first_token_s,
                "p50_ms": statistics.median(gaps) * 1e3,
                "p99_ms": percentile(gaps, 99) * 1e3,
                "max_ms": max(gaps) * 1e3,
                "tokens_s": len(gaps) / (end - begin),
            }
