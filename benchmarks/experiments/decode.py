"""Decode step by context and budget.

An attention-bound model; a step's time is the median gap between tokens. Batches are
copies of one length. Stock vLLM has no figure where the pool does not hold a batch.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.engines import Measured
from benchmarks.load import Ask, random_prompt
from benchmarks.rounds import STOCK

COLUMNS = ("context", "batch", "budget", "stock_ms", "ours_ms", "ratio")
PLOT = {"x": "context", "y": "ratio", "line": "batch"}


def step_seconds(engine: Measured, asks: list[Ask]) -> float:
    """Median gap between tokens while all requests decode."""
    answers = engine.run(asks).answers
    begin = max(answer.token_times[0] for answer in answers)
    end = min(answer.token_times[-1] for answer in answers)
    return statistics.median(g for answer in answers for g in answer.gaps(begin, end))


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row a context, batch and budget."""
    scale = bench.scale
    longest, largest = max(scale.decode_contexts), max(scale.decode_batches)

    def output_tokens(context: int, batch: int) -> int:
        # Those that are prefilled first wait for the last.
        return 2 * scale.decode_steps + batch * -(-context // bench.step_tokens)

    max_model_len = longest + max(1024, output_tokens(longest, largest))
    pool_tokens = max_model_len * largest
    if scale.most_pool_tokens is not None:
        pool_tokens = min(pool_tokens, scale.most_pool_tokens)
    policies = {"asl": {"policy": "asl", "selection_layer": 1}}
    runs = [(True, {}), (False, policies)] if bench.apart else [(True, policies)]
    stock: dict[tuple[int, int], float] = {}
    for has_stock, ours in runs:
        with bench.engines(
            scale.attention_bound,
            ours,
            max_model_len=max_model_len,
            pool_tokens=pool_tokens,
            max_num_seqs=max(32, largest),
            stock=has_stock,
        ) as engines:
            by_name = {engine.name: engine for engine in engines}
            for context, batch in itertools.product(
                scale.decode_contexts, scale.decode_batches
            ):
                steps = output_tokens(context, batch)

                def step(name: str, budget: int | None) -> float:
                    prompts = (random_prompt(context, i) for i in range(batch))  # noqa: B023
                    asks = [Ask(prompt, steps, budget) for prompt in prompts]  # noqa: B023
                    return step_seconds(by_name[name], asks)  # noqa: B023

                if has_stock and (context + steps) * batch <= pool_tokens:
                    stock[context, batch] = step(STOCK, None)
                budgets = (scale.budget, min(2 * scale.budget, context // 2))
                for budget in sorted(set(budgets)) if ours else ():
                    seconds = step("asl", budget)
                    other = stock.get((context, batch))
                    yield {
                        "context": context,
                        "batch": batch,
                        "budget": budget,
                        "stock_ms": None if other is None else other * 1e3,
                        "ours_ms": seconds * 1e3,
                        "ratio": None if other is None else seconds / other,
                        "steps": scale.decode_steps,
                    }
