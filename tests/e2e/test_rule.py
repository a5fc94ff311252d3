"""The engine end to end equals a plain-PyTorch run of each policy's rule, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from asl_vllm.config import POLICY_NAMES
from asl_vllm.prefill import PrefillBuffers
from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing.harness import BLOCK, Engine, engine, random_prompt
from asl_vllm_testing.oracle import published
from asl_vllm_testing.oracle.asl import OracleResult, generate
from asl_vllm_testing.oracle.model import TinyDecoder
from tests.e2e.comparing import assert_same_answer, assert_same_selection
from tests.e2e.recording import record

WINDOW, L_MIN, L_OBS, TAU = 16, 2, 3, 0.6
MAX_TOKENS = 12
RULE = {"window": WINDOW, "pool_kernel": 7, "l_min": L_MIN, "l_obs": L_OBS, "tau": TAU}


@pytest.fixture(scope="module")
def running(random_model: Path) -> Iterator[Engine]:
    with engine(random_model, policy={"policy": "asl", **RULE}) as started:
        yield started


@pytest.fixture(scope="module")
def model(random_model: Path) -> TinyDecoder:
    return TinyDecoder.load(random_model)


def expected(model: TinyDecoder, ids: list[int], budget: int | float) -> OracleResult:
    kept = resolve_kept(
        budget, num_prompt_tokens=len(ids), block_size=BLOCK, window=WINDOW
    )
    return generate(model, ids, kept=kept, max_tokens=MAX_TOKENS, **RULE)


CASES = [(200, 64, 7), (333, 100, 8192), (777, 128, 256), (1025, 0.25, 300)]


@pytest.mark.parametrize(("num_tokens", "budget", "chunk"), CASES)
def test_equals_the_oracle(
    running: Engine,
    model: TinyDecoder,
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    budget: int | float,
    chunk: int,
) -> None:
    monkeypatch.setattr(running.factory, "chunk_tokens", chunk)
    decisions = record(monkeypatch, "asl")
    ids = random_prompt(num_tokens, seed=num_tokens)
    want = expected(model, ids, budget)
    (output,) = running.generate(
        [ids], budget=budget, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0
    )
    assert_same_selection(decisions.of_prompt[0], want, num_tokens)
    assert_same_answer(output, want, num_tokens)


def test_the_rule_is_adaptive(running: Engine, model: TinyDecoder) -> None:
    """The cases above would be weak if the rule always took the same layer."""
    layers = {
        expected(model, random_prompt(n, seed=n), budget).selection_layer
        for n, budget, _ in CASES
    }
    assert layers - {None}


@pytest.mark.parametrize("chunk", [13, 31, 64, 500, 8192])
def test_chunks_do_not_change_the_result(
    running: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    ids = random_prompt(400, seed=5)
    decisions = record(monkeypatch, "asl")
    whole = running.generate([ids], budget=96, max_tokens=MAX_TOKENS, ignore_eos=True)
    monkeypatch.setattr(running.factory, "chunk_tokens", chunk)
    parts = running.generate([ids], budget=96, max_tokens=MAX_TOKENS, ignore_eos=True)
    first, second = decisions.of_prompt
    assert [d.kept.tolist() for d in first] == [d.kept.tolist() for d in second]
    assert whole[0].outputs[0].token_ids == parts[0].outputs[0].token_ids
    assert whole[0].kv_transfer_params == parts[0].kv_transfer_params


def test_hidden_states_on_the_host_do_not_change_the_result(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_prompt(700, seed=6)
    decisions = record(monkeypatch, "asl")
    monkeypatch.setattr(running.factory, "chunk_tokens", 96)
    device = running.generate([ids], budget=96, max_tokens=MAX_TOKENS, logprobs=2)
    held = PrefillBuffers(running.factory.model.shape, 700, WINDOW, host_chunk=96)
    monkeypatch.setattr(running.factory, "buffers", held)
    host = running.generate([ids], budget=96, max_tokens=MAX_TOKENS, logprobs=2)
    first, second = decisions.of_prompt
    assert [d.kept.tolist() for d in first] == [d.kept.tolist() for d in second]
    assert device[0].outputs[0].logprobs == host[0].outputs[0].logprobs
    assert device[0].kv_transfer_params == host[0].kv_transfer_params


def test_batched_requests_answer_as_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_prompt(n, seed=n) for n in (130, 470, 260, 611)]
    alone = [
        running.generate([p], budget=96, max_tokens=MAX_TOKENS, ignore_eos=True)[0]
        for p in prompts
    ]
    together = running.generate(
        prompts, budget=96, max_tokens=MAX_TOKENS, ignore_eos=True
    )
    for one, many in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids
        assert one.kv_transfer_params == many.kv_transfer_params
    assert running.free_blocks == running.start_free


# Other policies, named by the request


def by_rule(
    model: TinyDecoder, policy: str, ids: list[int], budget: int | float
) -> OracleResult:
    """What the policy's published rule gives, with its published settings."""
    kept = resolve_kept(
        budget, num_prompt_tokens=len(ids), block_size=BLOCK, window=WINDOW
    )
    window = {"kept": kept, "window": WINDOW, "max_tokens": MAX_TOKENS}
    if policy == "snapkv":
        return generate(
            model, ids, kept=kept, max_tokens=MAX_TOKENS, policy="snapkv", **RULE
        )
    if policy == "fastkv":  # 15/32 of 8 layers
        return published.fastkv(
            model, ids, pool_kernel=7, tsp_layer=4, tsp_rate=0.2, **window
        )
    if policy == "gemfilter":  # 13/32 of 8 layers
        return published.gemfilter(
            model, ids, kept=kept, filter_layer=3, max_tokens=MAX_TOKENS
        )
    assert policy == "pyramidinfer"
    return published.pyramidinfer(model, ids, decay_ratio=0.9, **window)


OTHERS = ["snapkv", "fastkv", "gemfilter", "pyramidinfer"]
OTHER_CASES = [(200, 64, 7), (777, 100, 256), (1025, 0.25, 8192)]


@pytest.mark.parametrize("policy", OTHERS)
@pytest.mark.parametrize(("num_tokens", "budget", "chunk"), OTHER_CASES)
def test_a_request_gets_the_policy_it_names(
    running: Engine,
    model: TinyDecoder,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    num_tokens: int,
    budget: int | float,
    chunk: int,
) -> None:
    monkeypatch.setattr(running.factory, "chunk_tokens", chunk)
    decisions = record(monkeypatch, policy)
    ids = random_prompt(num_tokens, seed=num_tokens)
    want = by_rule(model, policy, ids, budget)
    (output,) = running.generate(
        [ids],
        budget=budget,
        policy=policy,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        logprobs=0,
    )
    assert output.kv_transfer_params["policy"] == policy
    assert_same_selection(decisions.of_prompt[0], want, num_tokens)
    assert_same_answer(output, want, num_tokens)


def test_policies_differ(model: TinyDecoder) -> None:
    """The cases above would be weak if all policies kept the same tokens."""
    ids = random_prompt(777, seed=777)
    kept = [by_rule(model, policy, ids, 100) for policy in OTHERS]
    kept.append(expected(model, ids, 100))
    answers = {tuple(want.logprobs) for want in kept}
    assert len(answers) == len(OTHERS) + 1
    costs = [sum(want.layer_tokens) for want in kept]
    assert len(set(costs)) == len(costs)
    # More than the budget goes deeper than FastKV's layer, and is cut there.
    fast = published.fastkv(
        model, ids, kept=73, window=WINDOW, pool_kernel=7, tsp_layer=4,
        tsp_rate=0.2, max_tokens=1,
    )  # fmt: skip
    assert fast.layer_tokens == [777] * 5 + [155] * 3


def test_policies_side_by_side(running: Engine) -> None:
    """Prompts of all policies in one batch are answered as each is alone."""
    ids = random_prompt(611, seed=611)
    alone = [
        running.generate(
            [ids], budget=96, policy=name, max_tokens=MAX_TOKENS, ignore_eos=True
        )[0]
        for name in POLICY_NAMES
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            extra_args={"kv_budget": 96, "kv_policy": name},
        )
        for name in POLICY_NAMES
    ]
    together = running.llm.generate(
        [{"prompt_token_ids": ids}] * len(params), params, use_tqdm=False
    )
    for name, one, many in zip(POLICY_NAMES, alone, together, strict=True):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids, name
        assert one.kv_transfer_params == many.kv_transfer_params
        if name == "none":
            assert many.kv_transfer_params is None
        else:
            assert many.kv_transfer_params["policy"] == name
            assert many.kv_transfer_params["kept_tokens"] == 67
    assert running.free_blocks == running.start_free


def test_no_policy_is_stock(running: Engine, model: TinyDecoder) -> None:
    """Unpruned, and in the prefix cache, which pruned requests never enter."""
    ids = random_prompt(500, seed=500)
    want = generate(model, ids, kept=None, max_tokens=MAX_TOKENS, **RULE)
    for seen_before in (0, 480):
        (output,) = running.generate(
            [ids], budget=96, policy="none", max_tokens=MAX_TOKENS, ignore_eos=True
        )
        assert list(output.outputs[0].token_ids) == want.tokens
        assert output.kv_transfer_params is None
        assert output.num_cached_tokens == seen_before


def test_a_policy_without_a_budget_prunes_nothing(running: Engine) -> None:
    (output,) = running.generate([random_prompt(300, seed=300)], policy="gemfilter")
    assert output.kv_transfer_params is None


@pytest.mark.parametrize("policy", ["h2o", "", 3, ["asl"]], ids=str)
def test_unknown_policies_are_refused(running: Engine, policy: Any) -> None:
    with pytest.raises(VLLMValidationError, match="kv_policy: got") as refused:
        running.generate([random_prompt(300, seed=300)], budget=96, policy=policy)
    assert refused.value.parameter == "kv_policy"


TOGETHER = [
    ("asl", 300, 96),
    ("gemfilter", 200, 80),
    ("snapkv", 90, 50),
    ("fastkv", 333, 0.5),
    ("asl", 130, 100),
    ("pyramidinfer", 170, 64),
    ("asl", 250, 60),
    ("snapkv", 70, 0.7),
]
"""Policies, tokens and budgets of prompts that fit into one chunk."""


def test_prompts_that_pass_together_answer_as_one_by_one(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keep the same tokens; all pass each layer at once."""
    recorded = [record(monkeypatch, name) for name in POLICY_NAMES if name != "none"]
    passes: list[int] = []
    run_layer = running.factory.model.run_layer

    def count(layer: int, positions: Tensor, *args: Any) -> None:
        passes.append(len(positions))
        run_layer(layer, positions, *args)

    monkeypatch.setattr(running.factory.model, "run_layer", count)
    prompts = [
        {"prompt_token_ids": random_prompt(n, seed=i)}
        for i, (_, n, _) in enumerate(TOGETHER)
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            extra_args={"kv_policy": policy, "kv_budget": budget},
        )
        for policy, _, budget in TOGETHER
    ]

    def ask(*which: int) -> tuple[list[Any], list[Any], int]:
        passes.clear()
        for decisions in recorded:
            decisions.clear()
        some = [prompts[i] for i in which], [params[i] for i in which]
        outputs = running.llm.generate(*some, use_tqdm=False)
        answers = [
            (output.outputs[0].token_ids, output.kv_transfer_params)
            for output in outputs
        ]
        return answers, [list(d.of_prompt) for d in recorded], len(passes)

    alone = [ask(i) for i in range(len(TOGETHER))]
    answers, decided, num_passes = ask(*range(len(TOGETHER)))
    assert answers == [answer for (answer,), _, _ in alone]
    for number, of_policy in enumerate(decided):
        want = [prompt for _, found, _ in alone for prompt in found[number]]
        for mine, theirs in zip(of_policy, want, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                for tokens, others in (
                    (one.kept, other.kept),
                    (one.deeper, other.deeper),
                ):
                    if isinstance(tokens, Tensor):
                        assert torch.equal(tokens, others)
                    else:
                        assert tokens is others
    # One for each layer, and as many for the prompt that starts over.
    layers = running.factory.model.shape.num_layers
    assert num_passes == 2 * layers
    assert max(passes) == sum(n for _, n, _ in TOGETHER)
