"""Quantised weights and KV caches beside a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asl_vllm_testing.harness import assert_pool_whole, drain, engine
from asl_vllm_testing.oracle.tasks import needle
from tests.e2e.quantised import write_int8_model

RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
BUDGET = 128


@pytest.mark.parametrize(
    "cache",
    [
        "auto",
        pytest.param(
            "fp8",
            marks=pytest.mark.skipif(
                not torch.cpu._is_avx512_supported(),
                reason="vLLM's FP8 KV cache needs AVX-512 or AMX on a CPU",
            ),
        ),
    ],
)
def test_quantised_weights_and_an_fp8_cache_keep_the_answers(
    tmp_path: Path, cache: str
) -> None:
    """Int8 weights and activations, all coarser than any choice of tokens."""
    prompts = [needle(seed, 600) for seed in range(6)]
    with engine(
        write_int8_model(tmp_path / "int8"),
        policy={"policy": "asl", **RULE},
        dtype="bfloat16",
        kv_cache_dtype=cache,
    ) as started:
        for budget in (None, BUDGET):
            outputs = started.generate(
                [prompt.token_ids for prompt in prompts], budget=budget, max_tokens=4
            )
            answers = [list(output.outputs[0].token_ids) for output in outputs]
            assert answers == [prompt.answer_ids for prompt in prompts]
        reports = [output.kv_transfer_params for output in outputs]
        assert all(report["pruned_tokens"] > 0 for report in reports)
        drain(started)
        assert_pool_whole(started)
