"""An engine whose unpruned prompts come back from host memory, beside pruned ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asl_vllm_testing.harness import BLOCK, Engine, drain, engine, random_prompt
from asl_vllm_testing.host_memory import host_memory

BUDGET = 4 * BLOCK
DOCUMENT = random_prompt(20 * BLOCK + 7, seed=1)
HIT = 20 * BLOCK


@pytest.fixture(scope="module")
def host(random_model: Path) -> Iterator[Engine]:
    with engine(
        random_model,
        policy={"policy": "snapkv", "window": 16, "check_integrity": True},
        kv_transfer_config=host_memory(),
        max_num_batched_tokens=1024,
        pool_tokens=40 * BLOCK,
    ) as started:
        yield started


def ask(host: Engine, prompt: list[int], **options: Any) -> tuple[list[int], int]:
    """Generated tokens, and cached ones."""
    (reply,) = host.generate([prompt], **options)
    drain(host)
    return list(reply.outputs[0].token_ids), reply.num_cached_tokens


def test_unpruned_prompts_come_back_and_pruned_ones_read_them(host: Engine) -> None:
    pruned = {"budget": BUDGET, "reuse": "read"}
    scratch = ask(host, DOCUMENT, **pruned)
    assert scratch[1] == 0
    answer, cached = ask(host, DOCUMENT)
    assert cached == 0
    host.llm.reset_prefix_cache()
    # Nothing of it is in the pool, and it is not loaded for a pruned prompt.
    assert ask(host, DOCUMENT, **pruned) == scratch
    assert ask(host, DOCUMENT) == (answer, HIT)
    # The window is computed, and with it what is in its block.
    assert ask(host, DOCUMENT, **pruned) == (scratch[0], HIT - BLOCK)


def test_what_pruned_prompts_take_was_stored_before(host: Engine) -> None:
    """The pool is small: they write where copies are still to be made."""
    host.llm.reset_prefix_cache(reset_connector=True)
    prompts = [random_prompt(30 * BLOCK + 7, seed=seed) for seed in (5, 6)]
    (reply,) = host.generate(prompts[:1])
    host.llm.reset_prefix_cache()
    ask(host, prompts[1], budget=20 * BLOCK)
    host.llm.reset_prefix_cache()
    again, cached = ask(host, prompts[0])
    assert cached == 30 * BLOCK
    assert again == list(reply.outputs[0].token_ids)
