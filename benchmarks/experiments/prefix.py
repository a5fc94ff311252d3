"""Prompts whose beginning is in the prefix cache.

Each comes after another one, without a budget, that shares its first half, nine tenths
or all of its tokens. Then eight samples of a prompt, to one sample of the same engine,
and eight questions at once about a cached document, answered at length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.bench import Bench
from benchmarks.engines import Measured
from benchmarks.load import Ask, Trace, random_prompt
from benchmarks.rounds import STOCK, in_turn, median, ratio

COLUMNS = ("what", "tokens", "budget", "engine", "cached", "stock_s", "ours_s", "ratio")
HITS = {"half of it cached": 1 / 2, "nine tenths cached": 9 / 10, "asked again": 1.0}
SAMPLES, QUESTIONS = 8, 8
QUESTION_SHARE = 0.01
"""Of a document's tokens, that are a question's."""


def variants(layers: int) -> dict[str, dict[str, Any]]:
    """Policies: one without a selection, and one that selects at half depth."""
    return {
        "snapkv": {"policy": "snapkv"},
        "asl": {"policy": "asl", "selection_layer": layers // 2 - 1},
    }


def ask(engine: Measured, prompt: Sequence[int], budget: int, **more: Any) -> Ask:
    """A request, pruned over what is cached; of stock vLLM without a budget."""
    if engine.stock:
        return Ask(prompt, **more)
    return Ask(prompt, budget=budget, reuse="read", **more)


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row a share of the prompt and policy, then samples, then questions."""
    scale = bench.scale
    policies = variants(scale.layer_bound["layers"])
    with bench.engines(
        scale.layer_bound,
        policies,
        max_model_len=scale.prefix_tokens + 64,
        pool_tokens=3 * scale.prefix_tokens,
        enable_prefix_caching=True,
    ) as engines:
        for what, share in HITS.items():
            yield from _hit(bench, engines, what, share)
        for engine in engines:
            if not engine.stock:
                yield _samples(bench, engine)
    # Room for the prompts of all questions in a prefill's buffers: they pass together.
    longest = max(
        scale.document_tokens + scale.answer_tokens + 64,
        QUESTIONS * scale.document_tokens,
    )
    beside = scale.document_tokens // 50 + scale.answer_tokens + 1024
    with bench.engines(
        scale.layer_bound,
        policies,
        max_model_len=longest,
        # Stock vLLM wants a pool that holds the longest request.
        pool_tokens=max(longest, scale.document_tokens + QUESTIONS * beside),
        enable_prefix_caching=True,
    ) as engines:
        yield from _questions(bench, engines)


def _hit(
    bench: Bench, engines: Sequence[Measured], what: str, share: float
) -> Iterator[dict[str, Any]]:
    tokens, budget = bench.scale.prefix_tokens, bench.scale.prefix_budget
    cached: dict[str, int] = {}

    def first_token(engine: Measured, number: int) -> float:
        seed = 7 * number + round(100 * share)
        first = random_prompt(tokens, seed)
        engine.run([Ask(first)])
        common = int(share * tokens)
        prompt = first[:common] + random_prompt(tokens - common, seed + 250)
        (answer,) = engine.run([ask(engine, prompt, budget)]).answers
        cached[engine.name] = answer.cached_tokens
        return answer.first_token_s

    times = in_turn(engines, bench.scale.rounds, first_token)
    yield from _rows(what, tokens, budget, times, cached, bench.scale.rounds)


def _samples(bench: Bench, engine: Measured) -> dict[str, Any]:
    tokens, budget = bench.scale.prefix_tokens, bench.scale.prefix_budget
    times: dict[int, list[float]] = {1: [], SAMPLES: []}
    for number in range(2 * bench.scale.rounds):
        samples = SAMPLES if number % 2 else 1
        # Of a prompt that nobody has asked before.
        prompt = random_prompt(tokens, 123 + number)
        trace = engine.run([ask(engine, prompt, budget, samples=samples)])
        times[samples].append(trace.seconds)
    named = {STOCK: times[1], engine.name: times[SAMPLES]}
    return {
        "what": f"{SAMPLES} samples, to one of its own",
        "tokens": tokens,
        "budget": budget,
        "engine": engine.name,
        "cached": 0,
        "stock_s": None,
        "ours_s": median(named, engine.name),
        "ratio": ratio(named, engine.name),
        "rounds": bench.scale.rounds,
    }


def _questions(bench: Bench, engines: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    scale = bench.scale
    tokens, budget = scale.document_tokens, scale.budget
    document = random_prompt(tokens, 77)
    common = int((1 - QUESTION_SHARE) * tokens)
    cached: dict[str, int] = {}

    def answered(engine: Measured, number: int) -> float:
        engine.run([Ask(document)])  # cached from the second time on
        trace: Trace = engine.run(
            [
                ask(
                    engine,
                    document[:common]
                    + random_prompt(tokens - common, QUESTIONS * number + i + 1),
                    budget,
                    max_tokens=scale.answer_tokens,
                )
                for i in range(QUESTIONS)
            ]
        )
        cached[engine.name] = min(answer.cached_tokens for answer in trace.answers)
        return trace.seconds

    rounds = min(scale.rounds, 3)
    times = in_turn(engines, rounds, answered)
    what = f"{QUESTIONS} questions at once, {scale.answer_tokens} tokens each"
    yield from _rows(what, tokens, budget, times, cached, rounds)


def _rows(
    what: str,
    tokens: int,
    budget: int,
    times: Mapping[str, Sequence[float]],
    cached: Mapping[str, int],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    for name in times:
        if name != STOCK:
            yield {
                "what": what,
                "tokens": tokens,
                "budget": budget,
                "engine": name,
                "cached": cached[name],
                "stock_s": median(times, STOCK),
                "ours_s": median(times, name),
                "ratio": ratio(times, name),
                "rounds": rounds,
            }
