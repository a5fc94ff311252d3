"""Tiny models of many architectures, each in the real engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed import parallel_state
from vllm.model_executor.models import registry

from asl_vllm_testing.architectures import ARCHITECTURES, Architecture
from asl_vllm_testing.drawn_weights import random_weights
from asl_vllm_testing.harness import Engine, engine
from asl_vllm_testing.whole_model import WholeModel
from tests.e2e.comparing import assert_same_answer, assert_same_selection
from tests.e2e.recording import record

BUDGET, CHUNK, TOKENS = 100, 64, 200
RULE = {"window": 16, "pool_kernel": 7, "selection_layer": 1}
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 512,
    "pool_tokens": 2048,
}
PROMPT = [token * 37 % 230 + 4 for token in range(TOKENS)]


@pytest.fixture(autouse=True, scope="module")
def quick_starts() -> Iterator[None]:
    """Engines that start in a second: weights are drawn, and what is slow is left out.

    vLLM looks at a model class in a process of its own, and each start and end of an
    engine collects garbage several times.
    """
    with pytest.MonkeyPatch.context() as patch, random_weights():
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


def answers(host: Engine, **asked: Any) -> Any:
    (output,) = host.generate(
        [PROMPT], max_tokens=8, ignore_eos=True, logprobs=0, **asked
    )
    return output


def logprobs(output: Any) -> list[float]:
    answer = output.outputs[0]
    pairs = zip(answer.logprobs, answer.token_ids, strict=True)
    return [given[token].logprob for given, token in pairs]


def plain_attributes(model: Any) -> list[dict[str, Any]]:
    """What passes could leave changed: numbers, lists of layers, groups."""
    return [{**vars(m), "children": dict(m._modules)} for m in model.modules()]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_unpruned_is_stock_and_pruned_is_the_oracle(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture.needs:
        pytest.importorskip(architecture.needs)
    folder = architecture.write(tmp_path / "model")
    options = {**OPTIONS, **architecture.options}
    with engine(folder, **options) as stock:
        wanted = answers(stock)
    # The same prompt is asked unpruned and pruned: it is computed twice.
    policy = {"policy": "asl", "reuse": "none", **RULE}
    with engine(folder, policy=policy, **options) as host:
        decoder = host.factory.model
        assert decoder.found.stages.name == architecture.way
        assert decoder.found.off == 0
        model = decoder.found.stages._model
        before, group = plain_attributes(model), parallel_state._PP
        monkeypatch.setattr(host.factory, "chunk_tokens", CHUNK)
        decisions = record(monkeypatch, "asl")
        unpruned, pruned = answers(host), answers(host, budget=BUDGET)
        assert plain_attributes(model) == before
        assert parallel_state._PP is group
        oracle = WholeModel(model, decoder._vllm_config)
        kept = pruned.kv_transfer_params["kept_tokens"]
        want = oracle.generate(PROMPT, kept=kept, max_tokens=8, **RULE)
        whole = oracle.generate(PROMPT, kept=None, max_tokens=8, **RULE)
    assert unpruned.outputs[0].token_ids == wanted.outputs[0].token_ids
    assert logprobs(unpruned) == logprobs(wanted)
    assert logprobs(unpruned) == pytest.approx(whole.logprobs, abs=1e-3)
    assert_same_selection(decisions.of_prompt[0], want, TOKENS)
    assert_same_answer(pruned, want, TOKENS, len(want.layer_tokens))
    # The cache that it answers from is another.
    assert want.logprobs != pytest.approx(whole.logprobs, abs=1e-3)
