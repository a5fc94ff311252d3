"""Gemma 3 270M, whose layers have a sliding window but for every sixth, served.

Skipped unless ``make weights-gemma`` has been run on this machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from asl_vllm_testing import real_model
from asl_vllm_testing.harness import Engine, engine
from asl_vllm_testing.whole_model import WholeModel
from tests.e2e.comparing import assert_same_answer

pytestmark = pytest.mark.skipif(
    not real_model.is_cached(real_model.GEMMA3),
    reason="Gemma 3 270M is not there; `make weights-gemma` fetches it",
)
FOLDER = real_model.cache_folder(real_model.GEMMA3)
LAYERS = 18
RULE: dict[str, Any] = {"window": 32, "pool_kernel": 7, "selection_layer": 5}
"""The layer is the first that sees all tokens."""
SIZES: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 30,
    "max_model_len": 4608,
    "pool_tokens": 32768,
}
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "A boat is on the lake.",
    "Birds sing in the trees.",
    "The road is long.",
)
NEEDLES = (
    (1000, "Oslo", "mango", 0.2),
    (2000, "Cairo", "cherry", 0.3),
    (4000, "Paris", "banana", 0.4),
)


def prompt(tokens: int, city: str, fruit: str, place: float) -> list[int]:
    """About so many tokens; the needle lies outside the windows of the last of them."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(tokens)
    lines = [rng.choice(FILLER) for _ in range(tokens // 6)]
    lines.insert(int(len(lines) * place), f"The secret fruit of {city} is the {fruit}.")
    text = " ".join([*lines, f"The secret fruit of {city} is the"])
    return list(tokenizer(text)["input_ids"])


def answers(host: Engine, ids: list[int], **asked: Any) -> Any:
    (output,) = host.generate([ids], max_tokens=4, logprobs=0, **asked)
    return output


@pytest.fixture(scope="module")
def stock() -> list[list[int]]:
    """vLLM's own answers, without asl_vllm."""
    with engine(FOLDER, **SIZES) as host:
        outputs = [answers(host, prompt(*needle)) for needle in NEEDLES]
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def gemma(stock: list[list[int]]) -> Iterator[Engine]:
    policy = {"policy": "asl", "reuse": "none", **RULE}
    with engine(FOLDER, policy=policy, **SIZES) as host:
        yield host


def test_unpruned_answers_are_those_of_vllm(
    gemma: Engine, stock: list[list[int]]
) -> None:
    for needle, wanted in zip(NEEDLES, stock, strict=True):
        assert list(answers(gemma, prompt(*needle)).outputs[0].token_ids) == wanted


@pytest.mark.parametrize("needle", NEEDLES, ids=str)
def test_the_needle_is_answered_with_an_eighth_of_the_prompt(
    gemma: Engine, needle: tuple[int, str, str, float]
) -> None:
    ids = prompt(*needle)
    for budget in (None, 0.125):
        output = answers(gemma, ids, budget=budget)
        assert needle[2] in output.outputs[0].text
    report = output.kv_transfer_params
    assert report["selection_layer"] == RULE["selection_layer"]
    assert report["kept_tokens"] <= len(ids) / 8
    assert report["freed_blocks"] > 0


def test_a_pruned_answer_is_the_oracle_s(gemma: Engine) -> None:
    ids = prompt(*NEEDLES[0])
    decoder = gemma.factory.model
    oracle = WholeModel(decoder.found.stages._model, decoder._vllm_config)
    pruned = answers(gemma, ids, budget=0.125)
    kept = pruned.kv_transfer_params["kept_tokens"]
    want = oracle.generate(ids, kept=kept, max_tokens=4, **RULE)
    assert_same_answer(pruned, want, len(ids), LAYERS)
