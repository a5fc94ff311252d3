"""Where pruning loses.

Time to first token of a prompt asked again that stock vLLM finds in its prefix cache
(pruned requests do not fill it), a short prompt, and a budget of nearly the whole
prompt, selected late.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.rounds import STOCK, first_token, in_turn, median, ratio

COLUMNS = ("what", "tokens", "budget", "stock_s", "ours_s", "ratio")
SHORT, SHORT_BUDGET = 128, 64


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row a case."""
    long, shape = sorted(bench.scale.prefill_tokens)[1], bench.scale.layer_bound
    policies = {"asl": {"policy": "asl", "selection_layer": shape["layers"] * 3 // 4}}
    cases = (
        ("the same prompt again, cached by stock vLLM", long, long // 4, True),
        ("a short prompt", SHORT, SHORT_BUDGET, False),
        ("a budget of 7/8, selected late", long, long * 7 // 8, False),
    )
    with bench.engines(
        shape,
        policies,
        max_model_len=long + 64,
        pool_tokens=4 * long,
        enable_prefix_caching=True,
    ) as engines:
        for seed, (what, length, budget, repeat) in enumerate(cases):
            measure = first_token(length, budget, seed=1000 * seed, repeat=repeat)
            times = in_turn(engines, 4 * bench.scale.rounds, measure)
            yield {
                "what": what,
                "tokens": length,
                "budget": budget,
                "stock_s": median(times, STOCK),
                "ours_s": median(times, "asl"),
                "ratio": ratio(times, "asl"),
                "rounds": 4 * bench.scale.rounds,
            }
