"""Cost growth with the prompt's length.

Seconds a thousand tokens show what grows faster than the prompt. Long contexts do not
fit a CPU's caches, so times follow what else the host does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.rounds import STOCK, first_token, in_turn, median, ratio

COLUMNS = ("tokens", "engine", "seconds", "s_per_1k", "ratio")
ROUNDS = 3
PLOT = {"x": "tokens", "y": "s_per_1k", "line": "engine"}


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row a length and engine."""
    scale = bench.scale
    middle = scale.long["layers"] // 2 - 1
    policies = {
        "snapkv": {"policy": "snapkv"},
        f"asl after layer {middle}": {"policy": "asl", "selection_layer": middle},
    }
    longest = max(scale.growth_tokens)
    rounds = min(ROUNDS, scale.rounds)
    with bench.engines(
        scale.long, policies, max_model_len=longest + 64, pool_tokens=longest + 2048
    ) as engines:
        for num_tokens in scale.growth_tokens:
            budget = min(scale.budget, num_tokens // 2)
            measure = first_token(num_tokens, budget)
            times = in_turn(engines, rounds, measure, warm_up=num_tokens <= 4096)
            for name in times:
                yield {
                    "tokens": num_tokens,
                    "engine": name,
                    "seconds": median(times, name),
                    "s_per_1k": median(times, name) / num_tokens * 1024,
                    "ratio": ratio(times, name) if name != STOCK else 1.0,
                    "rounds": rounds,
                }
