"""The whole rule on an engine's own queries and keys, against fp32 PyTorch.

An engine prefills prompts under a budget. What its policy was shown of each layer, and
what it decided, is compared with the oracle on a CPU: the scores, the tokens that
each KV head keeps, the variance ratios, and the selection layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.expected import BUDGET, MODEL, RULE, load
from benchmarks.gpu.sizes import shape
from benchmarks.gpu.stage import Host, Row, Stage
from benchmarks.load import random_prompt

SCORE_ERROR = 1e-3
"""Of the greatest score: both add in fp32, in different orders."""
KEPT_SHARE = 0.99
"""Kept tokens in common, of each KV head: scores that nearly tie may change places."""
RATIO_ERROR = 0.02
"""Of a variance ratio: what such ties may do to it."""
OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 2048}
RANDOM_TOKENS, RANDOM_BUDGET = 8192, 1024
DRY_TOKENS, DRY_BUDGET = 400, 128


def run(host: Host) -> Iterator[Row]:
    """Yields a row a prompt of the shipped model and of a random one."""
    from asl_vllm_testing.random_model import write_random_model

    prompts = [want.prompt for want in load()]
    for number, row in enumerate(compare(host, MODEL, prompts, BUDGET, RULE)):
        yield {"model": "shipped", "prompt": number, **row}
    own = shape("1b", host)
    model = write_random_model(host.work / "model", device=host.device, **own)
    tokens, budget = RANDOM_TOKENS, RANDOM_BUDGET
    if host.dry:
        tokens, budget = DRY_TOKENS, DRY_BUDGET
    prompts = [random_prompt(tokens, seed) for seed in range(2)]
    rule = {"window": 32, "pool_kernel": 7, "l_min": 2, "l_obs": 2, "tau": 0.3}
    if not host.dry:
        rule |= {"l_min": 5, "l_obs": 4}
    for number, row in enumerate(compare(host, model, prompts, budget, rule)):
        yield {"model": "random", "prompt": number, **row}


def recording(layers: list[list[Any]]) -> type:
    """A policy that notes its scores' inputs and its decisions, in fp32 on the CPU."""
    import torch

    from asl_vllm.selection.policies import POLICIES

    base: Any = POLICIES["asl"]

    class Recording(base):  # type: ignore[misc]
        def score(self, layer: int, queries: Any, keys: Any, scale: float) -> Any:
            if layer == 0:
                layers.append([])
            found = super().score(layer, queries, keys, scale)
            # Copies: the next layer's are written over these.
            own = [
                tensor.to("cpu", torch.float32, copy=True)
                for tensor in (queries, keys, found[0])
            ]
            layers[-1].append(own)
            return found

        def decide(self, layer: int, *scores: Any) -> Any:
            decision = super().decide(layer, *scores)
            layers[-1][-1].append(decision)
            return decision

    return Recording


def compare(
    host: Host, model: Any, prompts: list[list[int]], budget: int, rule: dict[str, Any]
) -> Iterator[Row]:
    """Yields a row a prompt."""
    from asl_vllm.selection.policies import POLICIES
    from asl_vllm_testing.harness import engine

    layers: list[list[Any]] = []
    longest = max(len(prompt) for prompt in prompts)
    options: dict[str, Any] = {"policy": {"policy": "asl", **rule}, **OPTIONS}
    options |= {"max_model_len": longest + 64, "kv_cache_memory_bytes": 1 << 30}
    if not host.dry:
        options |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05}
    stock = POLICIES["asl"]
    POLICIES["asl"] = recording(layers)
    try:
        with engine(model, **options) as running:
            for prompt in prompts:
                layers.clear()
                (output,) = running.generate([prompt], budget=budget, max_tokens=2)
                report = output.kv_transfer_params
                (own,) = layers
                yield row_of(own, report, rule)
    finally:
        POLICIES["asl"] = stock


def row_of(layers: list[Any], report: dict[str, Any], rule: dict[str, Any]) -> Row:
    """One prompt's layers against the oracle's rule on the same queries and keys."""
    from asl_vllm_testing.oracle.asl import SelectionRule, head_scores, with_window

    kept_tokens, window = report["kept_tokens"], rule["window"]
    num_top = kept_tokens - window
    settling = SelectionRule(num_top, rule["l_min"], rule["l_obs"], rule["tau"])
    selected = None
    score_error, kept_share, ratio_error = 0.0, 1.0, 0.0
    for layer, (queries, keys, got, decision) in enumerate(layers):
        want = head_scores(queries, keys, rule["pool_kernel"])
        error = (got - want).abs().max() / want.max()
        score_error = max(score_error, error.nan_to_num(nan=math.inf).item())
        keep = with_window(want, num_top, len(keys))
        for mine, theirs in zip(decision.kept.tolist(), keep.tolist(), strict=True):
            share = len(set(mine) & set(theirs)) / len(theirs)
            kept_share = min(kept_share, share)
        if settling.observe(want.sum(0)) and selected is None:
            selected = layer
        if decision.ratio is not None:
            error = abs(decision.ratio - settling.ratios[-1])
            ratio_error = max(ratio_error, math.inf if math.isnan(error) else error)
    return {
        "tokens": len(layers[0][1]),
        "layers": len(layers),
        "selection_layer": report["selection_layer"],
        "expected_layer": selected,
        "score_error": score_error,
        "kept_share": kept_share,
        "ratio_error": ratio_error,
        "ok": score_error <= SCORE_ERROR
        and kept_share >= KEPT_SHARE
        and ratio_error <= RATIO_ERROR
        and report["selection_layer"] == selected,
    }


STAGES = (
    Stage(
        "rule",
        "The whole rule on an engine's queries and keys, against fp32 PyTorch",
        seconds=180,
        run=run,
    ),
)
