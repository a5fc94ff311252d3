"""The shipped model still finds its needles with a twentieth of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_vllm.selection.policies import POLICIES, LayerDecision
from asl_vllm_testing import SHIPPED_MODEL
from asl_vllm_testing.harness import BLOCK, Engine, engine
from asl_vllm_testing.oracle.tasks import Prompt, key_value, needle
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.direct import DirectModel, variant

NUM_TOKENS, BUDGET, COUNT = 2048, 96, 6
# Prompts are asked more than once: each is computed, so that reports are equal.
POLICY: dict[str, Any] = {"policy": "asl", "window": 8, "reuse": "none"}


@pytest.fixture(scope="module")
def shipped() -> Iterator[Engine]:
    with engine(SHIPPED_MODEL, policy=POLICY, dtype="float32") as started:
        yield started


def questions() -> list[Prompt]:
    tasks = (needle, key_value)
    return [task(1000 + i, NUM_TOKENS) for task in tasks for i in range(COUNT)]


def right(host: Engine, budget: int | None) -> tuple[list[bool], list[Any]]:
    asked = questions()
    outputs = host.generate([q.token_ids for q in asked], budget=budget, max_tokens=4)
    marks = [
        list(o.outputs[0].token_ids)[: len(q.answer_ids)] == list(q.answer_ids)
        for o, q in zip(outputs, asked, strict=True)
    ]
    return marks, outputs


def test_answers_as_with_full_attention(shipped: Engine) -> None:
    full, _ = right(shipped, None)
    pruned, outputs = right(shipped, BUDGET)
    assert sum(full) >= 2 * COUNT - 1
    assert pruned == full
    for output in outputs:
        assert output.kv_transfer_params["selection_layer"] in (7, 8)
        assert output.kv_transfer_params["kept_tokens"] == BUDGET
        assert output.kv_transfer_params["freed_blocks"] == 61


@pytest.mark.parametrize("sampling", [{}, {"n": 2, "temperature": 1, "top_k": 1}])
def test_a_stop_string_is_an_end_like_any_other(
    shipped: Engine, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    """`LLM` finds it and has the engine abort the request, whose report never comes."""
    ended: list[str] = []
    tally = shipped.scheduler.connector.scheduler_side.tally
    count = tally.ended
    monkeypatch.setattr(
        tally, "ended", lambda policy, how: (ended.append(how), count(policy, how))
    )
    question = needle(1000, NUM_TOKENS)
    whole = shipped.generate([question.token_ids], budget=BUDGET, max_tokens=4)
    stop = question.answer_words[2]
    (output,) = shipped.generate(
        [question.token_ids], budget=BUDGET, max_tokens=8, stop=[stop], **sampling
    )
    before = question.answer_words[: question.answer_words.index(stop)]
    for sample in output.outputs:
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        assert sample.text.split() == before
    assert output.kv_transfer_params == whole[0].kv_transfer_params
    assert output.kv_transfer_params["kept_tokens"] == BUDGET
    assert ended == ["pruned"] * (1 + len(output.outputs))


def test_answers_computed_without_an_engine_are_the_same(shipped: Engine) -> None:
    """`benchmarks.accuracy.direct`, by which studies are made."""
    direct = DirectModel(str(SHIPPED_MODEL), NUM_TOKENS, POLICY["window"])
    made = variant(str(SHIPPED_MODEL), BLOCK, POLICY, sorted(POLICIES))
    for question in questions()[::COUNT]:
        direct.layers.begin_prompt(list(question.token_ids))
        for policy in sorted(POLICIES):
            (output,) = shipped.generate(
                [question.token_ids], budget=BUDGET, policy=policy, max_tokens=4
            )
            cell = Cell(policy, policy, BUDGET)
            reply = direct.reply(made, cell, list(question.token_ids), 4)
            assert reply.text.split() == output.outputs[0].text.split(), policy
            assert reply.kv_cache is not None
            report = output.kv_transfer_params
            assert {name: report[name] for name in reply.kv_cache} == reply.kv_cache


def test_random_tokens_answer_nothing(
    shipped: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: as many tokens, but random ones."""
    generator = torch.Generator().manual_seed(0)
    base = POLICIES["asl"]

    class Random(base):  # type: ignore[valid-type,misc]
        def decide(
            self,
            layer: int,
            layer_score: Tensor,
            head_scores: Tensor,
            observed: float | None,
        ) -> LayerDecision:
            return super().decide(
                layer,
                torch.rand(layer_score.shape, generator=generator),
                torch.rand(head_scores.shape, generator=generator),
                observed,
            )

    monkeypatch.setitem(POLICIES, "asl", Random)
    marks, outputs = right(shipped, BUDGET)
    assert outputs[0].kv_transfer_params["kept_tokens"] == BUDGET
    assert sum(marks) <= 2
