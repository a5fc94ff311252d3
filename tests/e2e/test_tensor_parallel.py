"""Two tensor-parallel ranks decide and answer as one."""

from __future__ import annotations

import importlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.exceptions import EngineDeadError

from asl_vllm.config import POLICY_NAMES
from asl_vllm_testing import warm
from asl_vllm_testing.harness import BLOCK, Engine, engine
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder

OTHERS = [name for name in POLICY_NAMES if name not in ("none", "asl")]
RULE = {
    **{"window": 16, "pool_kernel": 7, "reach": 6, "score_layers": 2},
    **{"l_min": 2, "l_obs": 3, "tau": 0.6},
}


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(4, 512) for _ in range(n)] for n in (200, 500, 333)]


def answers(llm: LLM) -> list[tuple[list[int], Any]]:
    """Of asl to all prompts, and of each other policy to one."""
    asked = [("asl", ids) for ids in prompts()]
    asked += [(name, prompts()[-1]) for name in OTHERS]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=10,
            ignore_eos=True,
            extra_args={"kv_budget": 100, "kv_policy": name},
        )
        for name, _ in asked
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for _, ids in asked], params, use_tqdm=False
    )
    return [(list(o.outputs[0].token_ids), o.kv_transfer_params) for o in outputs]


PLACES = (
    "asl_vllm.prefill.factory.make_policy",
    "asl_vllm.selection.policies.base.window_scores",
    "asl_vllm.prefill.prompt.gather_kept",
    "asl_vllm.engine.worker.decoder.VllmDecoder.write_kept",
)
"""What ranks do between passes, where an error of one is agreed on."""


def fail_on_rank_1(worker: Any, place: str) -> None:
    """Runs in each worker: the next call of ``place`` fails on rank 1."""
    if torch.distributed.get_rank() != 1:
        return
    path, _, name = place.rpartition(".")
    owner: Any = (
        resolve_obj_by_qualname(path)
        if "VllmDecoder" in path
        else importlib.import_module(path)
    )
    original = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)
        raise torch.OutOfMemoryError("injected on rank 1")

    setattr(owner, name, fail)


def errors_on_one_rank(two: Engine, place: str) -> None:
    """The request fails on both ranks; the next one is answered again."""
    two.llm.collective_rpc(fail_on_rank_1, args=(place,))
    for reason in ("error", "length"):
        (output,) = two.generate(prompts()[:1], budget=100, ignore_eos=True)
        assert output.outputs[0].finish_reason == reason, place
        two.check()


def a_rank_lost_in_a_layer(two: Engine) -> None:
    """Its process ends, and with it the engine: in seconds, not in minutes."""
    place = "asl_vllm.engine.worker.decoder.VllmDecoder._run_layer"
    two.llm.collective_rpc(fail_on_rank_1, args=(place,))
    began = time.monotonic()
    with pytest.raises((RuntimeError, EngineDeadError)):
        two.generate(prompts()[:1], budget=100)
    assert time.monotonic() - began < 60


def test_two_ranks_equal_one_and_the_oracle_and_fail_together(
    random_model: Path,
) -> None:
    policy = {"policy": "asl", **RULE}
    with engine(random_model, policy=policy) as one:
        want = answers(one.llm)
    with (
        warm.spawning(),
        engine(random_model, policy=policy, tensor_parallel_size=2) as two,
    ):
        got = answers(two.llm)
        assert two.free_blocks == two.start_free
        for place in PLACES:
            errors_on_one_rank(two, place)
        assert answers(two.llm) == got
        a_rank_lost_in_a_layer(two)
    assert got == want
    oracle = TinyDecoder.load(random_model)
    for ids, (tokens, report) in zip(prompts(), got, strict=False):
        kept = len(ids) - -(-(len(ids) - 100) // BLOCK) * BLOCK
        truth = generate(oracle, ids, kept=kept, max_tokens=10, **RULE)
        assert tokens == truth.tokens
        assert report["selection_layer"] == truth.selection_layer
