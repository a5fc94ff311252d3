"""A tiny Gemma 3, whose layers have a sliding window by turns, in the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from asl_vllm.engine.scheduler.blocks import WindowBlocksManager
from asl_vllm_testing.architectures import ARCHITECTURES
from asl_vllm_testing.drawn_weights import random_weights
from asl_vllm_testing.harness import BLOCK, Engine, add, engine, run_to_end, step
from asl_vllm_testing.whole_model import WholeModel
from tests.e2e.comparing import assert_same_answer

WINDOW = 48
"""Of its layers 0 and 2; 1 and 3 see all tokens."""
RULE = {"window": 16, "pool_kernel": 7, "selection_layer": 1}
PROMPT = [token * 37 % 230 + 4 for token in range(200)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    (gemma,) = [a for a in ARCHITECTURES if a.name == "Gemma3ForCausalLM"]
    folder = gemma.write(tmp_path_factory.mktemp("windows") / "model")
    sizes: dict[str, Any] = {"max_model_len": 512, "pool_tokens": 2048}
    policy = {"policy": "asl", **RULE}
    with (
        random_weights(),
        engine(folder, policy=policy, load_format="dummy", **sizes) as host,
    ):
        yield host


def answer(host: Engine, tokens: int = 8, **asked: Any) -> Any:
    (output,) = host.generate(
        [PROMPT], max_tokens=tokens, ignore_eos=True, logprobs=0, **asked
    )
    return output


def test_an_answer_longer_than_the_window_is_the_oracle_s(host: Engine) -> None:
    """The window moves on over what the prefill left there."""
    decoder = host.factory.model
    oracle = WholeModel(decoder.found.stages._model, decoder._vllm_config)
    pruned = answer(host, 100, budget=100)
    kept = pruned.kv_transfer_params["kept_tokens"]
    want = oracle.generate(PROMPT, kept=kept, max_tokens=100, **RULE)
    assert_same_answer(pruned, want, len(PROMPT), len(want.layer_tokens))


def test_window_blocks_are_held_as_those_of_an_unpruned_request(host: Engine) -> None:
    managers = host.scheduler.kv_cache_manager.coordinator.single_type_managers
    (windows,) = [m for m in managers if isinstance(m, WindowBlocksManager)]

    def columns(request_id: str) -> list[int]:
        row = windows.req_to_blocks[request_id]
        return [column for column, block in enumerate(row) if not block.is_null]

    seen = []
    for budget in (None, 100):
        request = add(host, f"with {budget}", PROMPT, budget=budget, max_tokens=70)
        held = {}
        while not request.finished:
            step(host, request)
            host.check()
            # In the step of a whole prompt vLLM still holds all its blocks.
            if request.num_generated > 1 and not request.finished:
                held[request.num_generated] = columns(request.request_id)
        seen.append(held)
    assert seen[0] == seen[1]
    most = WINDOW // BLOCK + 2
    assert all(0 < len(row) <= most for row in seen[1].values())


def test_unpruned_neighbours_find_their_prefix(host: Engine) -> None:
    first = answer(host, salt="neighbours")
    pruned = answer(host, budget=100, salt="neighbours")
    again = answer(host, salt="neighbours")
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert again.num_cached_tokens >= len(PROMPT) - WINDOW - BLOCK
    assert pruned.num_cached_tokens == 0


def test_requests_at_once_answer_as_alone(host: Engine) -> None:
    budgets = (100, None, 64, 128, None)
    alone = [answer(host, budget=budget).outputs[0].token_ids for budget in budgets]
    together = [
        add(host, f"at once {index}", PROMPT, budget=budget)
        for index, budget in enumerate(budgets)
    ]
    run_to_end(host, *together)
    assert [request.tokens for request in together] == [list(ids) for ids in alone]


@pytest.mark.parametrize("policy", ["fastkv", "pyramidinfer", "snapkv"])
def test_other_policies_select_in_layers_that_see_all_tokens(
    host: Engine, policy: str
) -> None:
    report = answer(host, budget=100, policy=policy).kv_transfer_params
    assert report["policy"] == policy
    # What pyramidinfer would drop of so short a prompt lies within the window.
    expected = {"snapkv": None, "fastkv": 1, "pyramidinfer": None}
    assert report["selection_layer"] == expected[policy]
