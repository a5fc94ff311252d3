"""From a request's budget to the blocks that are pruned and the tokens that stay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams

from asl_vllm.config import POLICY_NAMES, AslConfig
from asl_vllm.engine.frontend.admission import plan_request
from asl_vllm.engine.plan import PLAN_KEY, PrunePlan, plan_of
from asl_vllm.engine.settings import Settings
from asl_vllm.prefill import PrefillReport
from asl_vllm.selection.budget import minimum_budget

CONFIG = AslConfig(policy="asl")


class Sizes(Settings):
    """Settings of an engine that is nothing but a block size."""

    block_size = 16
    max_model_len = 10_000
    reads_prefixes = False


def sizes(config: AslConfig, block_size: int = 16) -> Settings:
    kind = type("SizesOfABlock", (Sizes,), {"block_size": block_size})
    made: Settings = kind(config, None)
    return made


def plan_for(config: AslConfig, prompt: int, block: int = 16, **fields: Any) -> Any:
    return plan_request(sizes(config, block), fields, prompt)


def policy_budget_kept(plan: PrunePlan | None) -> tuple[str, Any, int] | None:
    return plan and (plan.policy, plan.budget, plan.kept_tokens)


@pytest.mark.parametrize(
    ("prompt", "block", "budget", "kept"),
    [
        (1000, 16, 256, 248),  # (1000 - 256) / 16 is 46.5: 47 blocks go
        (1024, 16, 256, 256),
        (1000, 16, 999, 984),
        (1000, 16, 48, 40),
        (1000, 16, 1000, 1000),
        (1000, 16, 5000, 1000),
        (40, 16, 256, 40),
        (1000, 16, 0.25, 248),  # a quarter is 250
        (1000, 16, 1.0, 1000),
        (1000, 16, 0.001, 40),  # a share is at least the minimum, 48
        (20, 16, 0.001, 20),
        (1000, 128, 256, 232),
    ],
)
def test_kept_tokens(prompt: int, block: int, budget: int | float, kept: int) -> None:
    plan = plan_for(CONFIG, prompt, block, kv_budget=budget)
    assert policy_budget_kept(plan) == ("asl", budget, kept)
    assert plan.pruned_tokens == plan.pruned_blocks * block == prompt - kept


@given(
    prompt=st.integers(1, 5000),
    block=st.sampled_from([1, 16, 32, 48, 128]),
    window=st.integers(1, 64),
    budget=st.one_of(st.integers(129 + 64, 6000), st.floats(0, 1, exclude_min=True)),
)
def test_a_plan_keeps_all_that_whole_blocks_let_it(
    prompt: int, block: int, window: int, budget: int | float
) -> None:
    config = AslConfig(policy="snapkv", window=window)
    plan = plan_for(config, prompt, block, kv_budget=budget)
    allowed = budget
    if isinstance(budget, float):
        allowed = max(minimum_budget(window, block), int(budget * prompt))
    if allowed >= prompt:
        assert plan.pruned_blocks == 0
    else:
        assert window < plan.kept_tokens <= allowed < plan.kept_tokens + block


def test_no_budget_is_no_plan() -> None:
    assert plan_for(CONFIG, 1000) is None


def test_a_request_without_budget_gets_the_servers() -> None:
    config = AslConfig(policy="asl", budget=512)
    assert policy_budget_kept(plan_for(config, 1024)) == ("asl", 512, 512)


def test_a_requests_own_budget_wins() -> None:
    config = AslConfig(policy="asl", budget=512)
    assert policy_budget_kept(plan_for(config, 1024, kv_budget=256)) == (
        *("asl", 256),
        256,
    )
    assert plan_for(config, 1024, kv_budget=1.0).pruned_blocks == 0


def test_without_a_policy_nothing_is_planned() -> None:
    assert plan_for(AslConfig(), 1000, kv_budget=256) is None
    assert plan_for(AslConfig(), 1000, kv_budget=256, kv_policy="snapkv") is None


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_requests_own_policy_wins(name: str) -> None:
    for config, own in (
        (CONFIG, {"kv_budget": 256}),
        (AslConfig(policy="asl", budget=256), {}),
    ):
        plan = plan_for(config, 1024, kv_policy=name, **own)
        wanted = None if name == "none" else (name, 256, 256)
        assert policy_budget_kept(plan) == wanted


def test_a_policy_alone_prunes_nothing() -> None:
    assert plan_for(CONFIG, 1000, kv_policy="snapkv") is None


def test_a_budget_beyond_any_prompt_fits_vllms_messages() -> None:
    plan = plan_for(CONFIG, 1000, kv_budget=1 << 70)
    assert (plan.budget, plan.pruned_blocks) == (10_000, 0)


def test_what_a_plan_comes_to_where_no_band_is_pruned() -> None:
    plan = plan_for(CONFIG, 1000, kv_budget=256)
    two = PrefillReport(3, 700, 2000, 0.1, pruned_bands=2)
    assert plan.in_force(two) is plan
    assert plan.freed_blocks(two) == 94
    for report in (PrefillReport(None, 700, 0, 0.1, pruned_bands=0), None):
        none = plan.in_force(report)
        assert (none.kept_tokens, none.pruned_tokens) == (1000, 0)
        assert plan.freed_blocks(report) == 0


def test_a_plan_travels_in_extra_args() -> None:
    plan = plan_for(CONFIG, 1000, kv_budget=256)
    params = SamplingParams(extra_args={"other": 1})
    assert plan_of(params) is None
    plan.send_with(params)
    assert params.extra_args is not None
    assert set(params.extra_args) == {"other", PLAN_KEY}
    assert plan_of(params) == plan
    assert plan_of(SamplingParams()) is None
    assert plan_of(None) is None
