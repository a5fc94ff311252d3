"""A real pretrained model in the engine, against the authors' own implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm_testing import real_model
from asl_vllm_testing.golden import real_prompts
from asl_vllm_testing.harness import BLOCK, Engine, engine
from tests.e2e.recording import record

PAPER = {"policy": "asl", "preset": "paper"}
LAYERS = 30


@pytest.fixture(scope="module")
def smollm() -> Iterator[Engine]:
    try:
        folder = real_model.fetch()
    except real_model.DownloadError as error:
        pytest.skip(f"the real model could not be downloaded: {error}")
    with engine(folder, policy=PAPER, kv_cache_memory_bytes=1 << 30) as host:
        yield host


def test_the_recordings_are_of_the_papers_settings() -> None:
    config = AslConfig.from_dict(PAPER)
    for prompt in real_prompts():
        rule = config.resolved_rule(LAYERS)
        assert {name: prompt[name] for name in rule} == rule
        assert (prompt["window"], prompt["pool_kernel"]) == (
            config.window,
            config.pool_kernel,
        )


def test_selects_where_and_what_the_authors_code_selects(
    smollm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = record(monkeypatch, "asl")
    assert BLOCK == 32
    layers = []
    for prompt in real_prompts():
        decisions.clear()
        (output,) = smollm.generate(
            [prompt["ids"]], budget=prompt["budget"], max_tokens=1
        )
        report = output.kv_transfer_params
        assert report["kept_tokens"] == prompt["kept"]
        assert report["selection_layer"] == prompt["selection_layer"]
        layers.append(report["selection_layer"])
        if prompt["selected"] is not None:
            (mine,) = decisions.of_prompt
            deeper = mine[-1].deeper
            assert isinstance(deeper, Tensor)
            assert deeper.tolist() == prompt["selected"]
    assert layers.count(10) == 2
    assert layers.count(None) == 7
