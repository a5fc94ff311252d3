"""Requests that prune nothing are stock vLLM to the bit, prefix cache included."""

from __future__ import annotations

import multiprocessing
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from asl_vllm_testing import TINY_MODEL, warm
from asl_vllm_testing.harness import Engine, engine


def prompts(vocab: int) -> list[list[int]]:
    """Three that share long prefixes, and two that do not."""
    rng = random.Random(0)
    shared = [rng.randrange(4, vocab) for _ in range(600)]
    tails = [[rng.randrange(4, vocab) for _ in range(n)] for n in (40, 90, 17)]
    others = [[rng.randrange(4, vocab) for _ in range(n)] for n in (33, 700)]
    return [shared + tail for tail in tails] + others


def answers(host: Engine, vocab: int, budgets: list[Any]) -> list[Any]:
    """Tokens, logprobs and cache hits of the same calls in the same order."""
    seen = []
    for budget in budgets:
        for group in (prompts(vocab), prompts(vocab)[:2], prompts(vocab)[2:]):
            outputs = host.generate(
                group, budget=budget, max_tokens=16, logprobs=3, ignore_eos=True
            )
            for output in outputs:
                completion = output.outputs[0]
                logprobs = [
                    {token: entry.logprob for token, entry in step.items()}
                    for step in completion.logprobs
                ]
                seen.append(
                    (list(completion.token_ids), logprobs, output.num_cached_tokens)
                )
    return seen


def _answer(sink: Any, model: str, vocab: int, options: dict[str, Any]) -> None:
    with engine(model, **options) as stock:
        sink.send(answers(stock, vocab, [None, None, None]))
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"asl_vllm", "asl_kernels", "asl_server"}


def stock_answers(
    monkeypatch: pytest.MonkeyPatch, model: Path, vocab: int, options: dict[str, Any]
) -> list[Any]:
    """Answers of vLLM in a process that loads no plugin."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    context = multiprocessing.get_context("spawn")
    source, sink = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sink, str(model), vocab, options))
    with warm.spawning():
        process.start()
    sink.close()
    want: list[Any] = source.recv()
    process.join()
    monkeypatch.delenv("VLLM_PLUGINS")
    assert process.exitcode == 0
    return want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_pruning_equals_stock(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    model = random_model if dtype == "float32" else TINY_MODEL
    vocab = 512 if dtype == "float32" else 240
    options = {"dtype": dtype, "max_num_batched_tokens": 512}
    want = stock_answers(monkeypatch, model, vocab, options)
    policy = {"policy": "asl", "window": 8}
    with engine(model, policy=policy, **options) as pruning:
        got = answers(pruning, vocab, [None, 1.0, 4096])
    assert got == want
    assert any(cached for _, _, cached in want), "the prefix cache was never hit"


def test_unpruned_stay_stock_beside_pruned(random_model: Path) -> None:
    """Neighbours with a budget change nothing about what the others answer.

    Batched matrix products may round otherwise, so tokens are compared, in fp32.
    """
    plain = prompts(512)
    with engine(random_model) as stock:
        want = [
            list(o.outputs[0].token_ids)
            for o in stock.generate(plain, max_tokens=16, ignore_eos=True)
        ]
    with engine(random_model, policy={"policy": "asl", "window": 8}) as pruning:
        pruned = [ids[::-1] for ids in prompts(512) if len(ids) > 100]
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        small = params.clone()
        small.extra_args = {"kv_budget": 64}
        mixed: list[Any] = []
        for i, ids in enumerate(plain):
            mixed.append((ids, params))
            if i < len(pruned):
                mixed.append((pruned[i], small))
        outputs = pruning.llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in mixed],
            [p for _, p in mixed],
            use_tqdm=False,
        )
        got = [
            list(o.outputs[0].token_ids)
            for o, (_, p) in zip(outputs, mixed, strict=True)
            if p is params
        ]
        reports = [o.kv_transfer_params for o in outputs if o.kv_transfer_params]
    assert got == want
    assert len(reports) == len(pruned)
    assert all(r["pruned_tokens"] > 0 for r in reports)
