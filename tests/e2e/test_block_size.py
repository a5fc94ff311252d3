"""An engine that chooses its block size itself, as one without ``--block-size`` does.

On CPUs 0.33 settles it when the model is loaded; 0.32 when arguments are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.config import CacheConfig
from vllm.exceptions import VLLMValidationError

from asl_vllm.selection.budget import minimum_budget, resolve_kept
from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.harness import Engine, assert_pool_whole, engine
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import needle

RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
BLOCKS = 64


@pytest.fixture(scope="module")
def host() -> Iterator[Engine]:
    policy = {"policy": "asl", **RULE, "max_prefill_tokens": 1024}
    with engine(
        policy=policy, block_size=None, num_gpu_blocks_override=BLOCKS
    ) as started:
        yield started


def test_it_starts_with_a_size_that_is_not_the_default(host: Engine) -> None:
    """The worker refuses a pool of other blocks than its memory is in."""
    assert host.scheduler.block_size != CacheConfig.DEFAULT_BLOCK_SIZE


def test_a_prompt_is_pruned_in_these_blocks(host: Engine) -> None:
    block = host.scheduler.block_size
    budget = minimum_budget(8, block)
    prompt = needle(1, 600).token_ids
    kept = resolve_kept(
        budget, num_prompt_tokens=len(prompt), block_size=block, window=8
    )
    assert (len(prompt) - kept) % block == 0
    (output,) = host.generate([prompt], budget=budget, max_tokens=12, ignore_eos=True)
    expected = generate(
        TinyDecoder.load(TINY_MODEL), prompt, kept=kept, max_tokens=12, **RULE
    )
    assert list(output.outputs[0].token_ids) == expected.tokens
    assert output.kv_transfer_params["kept_tokens"] == kept
    assert_pool_whole(host)


def test_budgets_are_held_against_these_blocks(host: Engine) -> None:
    least = minimum_budget(8, host.scheduler.block_size)
    with pytest.raises(VLLMValidationError, match=rf"at least {least}\b"):
        host.generate([needle(1, 600).token_ids], budget=least - 1)
