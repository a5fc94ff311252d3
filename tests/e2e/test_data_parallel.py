"""Two data-parallel engines behind one front end prune like one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing import TINY_MODEL, warm
from asl_vllm_testing.harness import BLOCK
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import needle

RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
BUDGET = 128
POOL_BLOCKS = 32
PROMPTS = [needle(seed, 500 + 50 * seed).token_ids for seed in range(4)]


def params(budget: int | None) -> SamplingParams:
    extra = {"kv_budget": budget} if budget else None
    return SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, extra_args=extra
    )


async def answer(host: AsyncLLM, name: str, ids: list[int], **kw: Any) -> Any:
    final = None
    async for output in host.generate({"prompt_token_ids": ids}, request_id=name, **kw):
        final = output
    return final


async def run() -> tuple[list[Any], str]:
    """Answers of each engine to each prompt, and a refusal."""
    host = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(TINY_MODEL),
            dtype="float32",
            max_model_len=4096,
            enforce_eager=True,
            block_size=BLOCK,
            max_num_seqs=8,
            kv_cache_memory_bytes=1 << 26,
            num_gpu_blocks_override=POOL_BLOCKS + 1,
            data_parallel_size=2,
            additional_config={"asl_vllm": {"policy": "asl", **RULE}},
        )
    )
    try:
        outputs = await asyncio.gather(
            *(
                answer(
                    host,
                    f"{rank}-{index}",
                    ids,
                    sampling_params=params(BUDGET),
                    data_parallel_rank=rank,
                )
                for rank in range(2)
                for index, ids in enumerate(PROMPTS)
            )
        )
        # It would fit both engines' blocks, but a request lives in one.
        with pytest.raises(VLLMValidationError) as refused:
            long = needle(9, 1200).token_ids
            await answer(host, "long", long, sampling_params=params(None))
        return outputs, str(refused.value)
    finally:
        host.shutdown()


def test_each_engine_equals_the_oracle() -> None:
    with warm.spawning():
        outputs, refusal = asyncio.run(run())
    model = TinyDecoder.load(TINY_MODEL)
    for output, ids in zip(outputs, 2 * PROMPTS, strict=True):
        kept = resolve_kept(
            BUDGET, num_prompt_tokens=len(ids), block_size=BLOCK, window=8
        )
        want = generate(model, ids, kept=kept, max_tokens=6, **RULE)
        assert list(output.outputs[0].token_ids) == want.tokens
        report = output.kv_transfer_params
        assert report["selection_layer"] == want.selection_layer
        assert report["kept_tokens"] == kept
    assert f"do not fit the KV pool of {POOL_BLOCKS * BLOCK} tokens" in refusal
