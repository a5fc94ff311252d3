"""The weights that are shipped are what the model card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asl_vllm_testing import TINY_MODEL
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.direct import DirectModel, variant
from benchmarks.accuracy.prompts import PromptMaker
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tokens import HubTokenizer
from training.model import ModelConfig

MODEL = Path(__file__).parents[2] / "examples" / "deep_retriever"
LENGTH, COUNT = 400, 4


@pytest.fixture(scope="module")
def model() -> DirectModel:
    return DirectModel(str(MODEL), LENGTH, 8)


def test_it_is_the_model_that_training_makes() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config == ModelConfig().to_qwen3() | {"torch_dtype": "bfloat16"}
    assert (MODEL / "model.safetensors").stat().st_size < 12e6
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (MODEL / name).read_bytes() == (TINY_MODEL / name).read_bytes()


@pytest.mark.parametrize(
    "task", ["needle", "key_value", "hops_1", "hops_2", "hops_3", "hops_4"]
)
def test_answers_with_an_eighth_of_the_cache(model: DirectModel, task: str) -> None:
    """asl by default settings, which stops early enough to save prefill."""
    made = variant(str(MODEL), 32, {"window": 8}, ["asl"])
    maker = PromptMaker(HubTokenizer(str(MODEL), "none"), split="tuning", seed=1)
    right, layers = 0.0, []
    for index in range(COUNT):
        prompt = maker.prompt(TASKS[task], LENGTH, index)
        model.layers.begin_prompt(prompt.token_ids)
        cell = Cell("asl", "asl", LENGTH // 8)
        reply = model.reply(made, cell, prompt.token_ids, TASKS[task].max_tokens)
        assert reply.kv_cache is not None
        right += TASKS[task].score(reply.text, prompt.answers)
        layers.append(reply.kv_cache["selection_layer"])
    assert right >= COUNT - 1
    found = [layer for layer in layers if layer is not None]
    assert len(found) >= COUNT - 1
    assert max(found) < 14
