"""Requests without a budget on a server with a policy.

What those pay who do not ask for pruning: it should be nothing. Differences are small,
so there are many rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.engines import Measured
from benchmarks.load import Ask, Trace, random_prompt
from benchmarks.rounds import (
    STOCK,
    Measure,
    first_token,
    in_turn,
    median,
    ratio,
)

COLUMNS = ("what", "stock_ms", "ours_ms", "ratio")
STARTS, ROUNDS_FACTOR = 4, 2
BATCH, PROMPT, OUTPUT = 4, 128, 32


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields time to first token, inter-token latency and time of a whole batch.

    Engines start several times, so that no single process decides.
    """
    rounds = ROUNDS_FACTOR * bench.scale.rounds
    times: dict[str, dict[str, list[float]]] = {}
    for start in range(STARTS):
        with bench.engines(
            bench.scale.layer_bound,
            {"asl": {"policy": "asl"}},
            max_model_len=4096,
            pool_tokens=8192,
        ) as engines:
            for what, measure in measures(seed=1000 * start):
                found = in_turn(engines, rounds, measure)
                of_all = times.setdefault(what, {name: [] for name in found})
                for name, values in found.items():
                    of_all[name] += values
    for what, both in times.items():
        yield {
            "what": what,
            "stock_ms": median(both, STOCK) * 1e3,
            "ours_ms": median(both, "asl") * 1e3,
            "ratio": ratio(both, "asl"),
            "rounds": len(both[STOCK]),
        }


def measures(seed: int) -> Iterator[tuple[str, Measure]]:
    """What is measured of an engine, with prompts of its own for each seed."""
    traces: dict[tuple[str, int], Trace] = {}

    def batch(engine: Measured, number: int) -> float:
        prompts = (random_prompt(PROMPT, seed + 17 * number + i) for i in range(BATCH))
        trace = engine.run([Ask(prompt, OUTPUT) for prompt in prompts])
        traces[engine.name, number] = trace
        return trace.seconds

    def gap(engine: Measured, number: int) -> float:
        answers = traces[engine.name, number].answers
        return statistics.median(
            g for answer in answers for g in answer.gaps(0.0, float("inf"))
        )

    yield "first token, prompt of 1024", first_token(1024, seed=seed)
    yield f"{BATCH} prompts of {PROMPT}, {OUTPUT} tokens each", batch
    yield "their inter-token latency", gap
