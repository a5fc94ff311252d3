"""Many short prompts at once.

All are sent together and ask for one token. Pruned ones pass a layer together as far as
they fit into a chunk; one by one: `chunk_tokens` of one prompt leaves no room for two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.engines import Measured
from benchmarks.load import Ask, random_prompt
from benchmarks.rounds import in_turn, median, ratio

COLUMNS = ("requests", "tokens", "budget", "engine", "requests_per_s", "time_ratio")
TOKENS, BUDGET = 512, 128


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row an engine."""
    scale = bench.scale
    together = {"policy": "asl", "selection_layer": scale.layer_bound["layers"] // 2}
    policies = {
        "asl": together,
        "asl, one by one": together | {"chunk_tokens": TOKENS},
    }
    with bench.engines(
        scale.layer_bound,
        policies,
        max_model_len=2 * TOKENS,
        pool_tokens=scale.short_requests * (TOKENS + 64),
    ) as engines:

        def seconds(engine: Measured, number: int) -> float:
            first = number * scale.short_requests
            budget = None if engine.stock else BUDGET
            asks = [
                Ask(random_prompt(TOKENS, first + i), 1, budget)
                for i in range(scale.short_requests)
            ]
            return engine.run(asks).seconds

        times = in_turn(engines, scale.rounds, seconds)
        for engine in engines:
            yield {
                "requests": scale.short_requests,
                "tokens": TOKENS,
                "budget": None if engine.stock else BUDGET,
                "engine": engine.name,
                "requests_per_s": scale.short_requests / median(times, engine.name),
                "time_ratio": ratio(times, engine.name),
                "rounds": scale.rounds,
            }
