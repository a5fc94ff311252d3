"""Time to first token by prompt length and selection layer.

A layer-bound model, without selection (snapkv) and with selection after a part of its
layers. Work is the share of an unpruned prefill's token-layers that is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.rounds import STOCK, first_token, in_turn, median, ratio

COLUMNS = ("tokens", "budget", "engine", "work", "stock_s", "ours_s", "ratio")
PLOT = {"x": "tokens", "y": "ratio", "line": "engine"}


def work_share(num_tokens: int, kept: int, layers: int, selection: int | None) -> float:
    """Token-layers that are left of an unpruned prefill's, of all."""
    if selection is None:
        return 1.0
    full = num_tokens * layers
    return (num_tokens * (selection + 1) + kept * (layers - selection - 1)) / full


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row a length and engine."""
    scale = bench.scale
    layers = scale.layer_bound["layers"]
    selections: dict[str, int | None] = {"snapkv": None}
    for depth in scale.depths:
        layer = round(layers * depth) - 1
        selections[f"asl after layer {layer}"] = layer
    policies = {
        name: {"policy": "snapkv"}
        if layer is None
        else {"policy": "asl", "selection_layer": layer}
        for name, layer in selections.items()
    }
    longest = max(scale.prefill_tokens)
    with bench.engines(
        scale.layer_bound,
        policies,
        max_model_len=longest + 64,
        pool_tokens=longest + 2048,
    ) as engines:
        for num_tokens in scale.prefill_tokens:
            budget = min(scale.budget, num_tokens // 2)
            measure = first_token(num_tokens, budget, layers=selections)
            times = in_turn(engines, scale.rounds, measure, warm_up=num_tokens <= 65536)
            for name, layer in selections.items():
                yield {
                    "tokens": num_tokens,
                    "budget": budget,
                    "engine": name,
                    "work": work_share(num_tokens, budget, layers, layer),
                    "stock_s": median(times, STOCK),
                    "ours_s": median(times, name),
                    "ratio": ratio(times, name),
                    "rounds": scale.rounds,
                }
