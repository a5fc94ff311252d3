"""What a request with or without a budget is checked for before it is admitted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from asl_vllm.engine.frontend.admission import admit, read, usable_blocks
from asl_vllm.engine.plan import PLAN_KEY, plan_of
from asl_vllm.engine.settings import settings_of
from asl_vllm_testing.vllm_configs import engine_config

BLOCK = 32
POOL = 10
"""Blocks that requests can hold: 320 tokens."""


def config(blocks: int | None = POOL, **options: Any) -> VllmConfig:
    """A pruning engine whose smallest budget is 40 and longest prompt 1024."""
    made = engine_config(
        {"policy": "asl", "window": 8, **options}, max_model_len=1024, block_size=BLOCK
    )
    made.cache_config.num_gpu_blocks = None if blocks is None else blocks + 1
    return made


def request(
    tokens: int,
    budget: Any = None,
    *,
    policy: str | None = None,
    more: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **kw: Any,
) -> EngineCoreRequest:
    extra = {"kv_budget": budget, "kv_policy": policy, **(extra or {})}
    fields: dict[str, Any] = {
        "request_id": "a",
        "prompt_token_ids": [7] * tokens,
        "mm_features": None,
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
        "sampling_params": SamplingParams(**{"max_tokens": 8, **kw}, extra_args=extra),
    }
    return EngineCoreRequest(**{**fields, **(more or {})})


def check(
    made: VllmConfig, asked: EngineCoreRequest, length_field: str | None = "max_tokens"
) -> SamplingParams:
    params, settings = asked.sampling_params, settings_of(made)
    assert params is not None
    given = read(settings, params)
    admit(settings, given, asked, length_field=length_field)
    return params


def refusal(made: VllmConfig, asked: EngineCoreRequest) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refused:
        check(made, asked)
    return refused.value


PRUNABLE = [
    ({"prompt_logprobs": 1}, {}, "prompt_logprobs"),
    ({}, {"prompt_embeds": torch.zeros(200, 4), "prompt_token_ids": None}, "embed"),
    ({}, {"mm_features": [object()]}, "multimodal"),
    ({}, {"resumable": True}, "streamed input"),
]


@pytest.mark.parametrize(("sampling", "more", "said"), PRUNABLE)
def test_what_a_pruned_prompt_cannot_give_is_refused(
    sampling: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    error = refusal(config(), request(200, 64, more=more, **sampling))
    assert error.parameter == "kv_budget"
    assert said in str(error)
    assert "kv_budget=1.0 prunes nothing" in str(error)


@pytest.mark.parametrize(("sampling", "more", "said"), PRUNABLE)
@pytest.mark.parametrize("budget", [None, 1.0, 500])
def test_a_prompt_that_is_not_pruned_may_have_it(
    budget: Any, sampling: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    check(config(), request(200, budget, more=more, **sampling))


@pytest.mark.parametrize(("sampling", "more", "said"), PRUNABLE)
def test_nothing_is_asked_of_a_request_without_a_policy(
    sampling: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    for made, budget in ((config(), 64), (config(budget=64), None)):
        asked = request(200, budget, policy="none", more=more, **sampling)
        assert plan_of(check(made, asked)) is None
        if budget:
            refusal(made, request(200, budget, policy="snapkv", more=more, **sampling))


def test_prompt_logprob_token_ids_are_refused_too() -> None:
    refusal(config(), request(200, 64, prompt_logprob_token_ids=[[1]] * 199))


def test_echo_with_logprobs_is_named_as_what_it_is() -> None:
    """A client that sent these never heard of prompt_logprobs."""
    assert "echo with logprobs" in str(
        refusal(config(), request(200, 64, prompt_logprobs=1))
    )


@pytest.mark.parametrize("policy", [None, "snapkv"])
@pytest.mark.parametrize(("sampling", "more", "said"), PRUNABLE)
def test_a_default_budget_gives_way(
    policy: str | None, sampling: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    """The client asked for none: what cannot be pruned runs as without a policy."""
    sampling = {**sampling, "skip_reading_prefix_cache": True}
    for budget in (64, 0.25):
        asked = request(200, policy=policy, more=more, **sampling)
        params = check(config(budget=budget), asked)
        assert plan_of(params) is None
        assert params.skip_reading_prefix_cache is True
    assert plan_of(check(config(budget=64), request(200))) is not None


def test_a_default_budget_gives_way_to_a_long_prompt() -> None:
    made = config(blocks=None, budget=64, max_prefill_tokens=300)
    assert plan_of(check(made, request(300))) is not None
    assert plan_of(check(made, request(301))) is None


def test_what_must_fit_whole_is_offered_no_budget() -> None:
    """The pool is the cause then, and a budget would be refused."""
    made = config(budget=64)
    message = str(refusal(made, request(400, prompt_logprobs=1)))
    assert "400 prompt tokens do not fit the KV pool of 320 tokens" in message
    assert message.count("kv_budget") == 0
    message = str(refusal(made, request(300, prompt_logprobs=1, max_tokens=30)))
    assert "Lower max_tokens to 21." in message


def test_prompts_beyond_the_reserved_memory_are_refused() -> None:
    made = config(blocks=None, max_prefill_tokens=300)
    check(made, request(300, 64))
    check(made, request(301))
    message = str(refusal(made, request(301, 64)))
    assert "301 tokens" in message
    assert "up to 300 (max_prefill_tokens)" in message


def test_a_pruned_request_meets_the_connector() -> None:
    params = check(config(), request(200, 64, skip_reading_prefix_cache=True))
    assert params.skip_reading_prefix_cache is False
    params = check(config(), request(200, 1.0, skip_reading_prefix_cache=True))
    assert params.skip_reading_prefix_cache is True


@pytest.mark.parametrize(
    ("cache", "options", "reuse"),
    [
        ({}, {}, "read"),
        ({}, {"reuse": "none"}, "none"),
        ({"enable_prefix_caching": False}, {}, "none"),
        ({"cache_dtype": "fp8"}, {}, "none"),
    ],
)
def test_prompts_read_where_there_is_something_to_read(
    cache: dict[str, Any], options: dict[str, Any], reuse: str
) -> None:
    """Whoever names a mode gets it: "read" takes what is there, be it nothing."""
    made = config(**options)
    for name, value in cache.items():
        setattr(made.cache_config, name, value)
    for named in (None, "read", "none"):
        plan = plan_of(check(made, request(200, 64, extra={"kv_reuse": named})))
        assert plan is not None
        assert plan.reuse == (named or reuse)
    assert settings_of(made).resolved_options()["reuse"] == reuse


@pytest.mark.parametrize(
    ("options", "value", "said"),
    [
        ({"bands": 5}, "all", "got 'all'; allowed: snapkv, full, or null"),
        ({"bands": 5}, 1, "got 1; allowed: snapkv, full"),
        ({"bands": 5}, ["full"], "got ['full']; allowed: snapkv"),
        ({}, "full", "--kv-bands above 1"),
        ({"bands": 5, "policy": "snapkv"}, "full", "with policy snapkv; allowed with"),
        ({"bands": 5, "policy": "gemfilter"}, "full", "allowed with: asl, fastkv,"),
    ],
)
def test_shallow_layers_that_cannot_be_had_are_refused(
    options: dict[str, Any], value: Any, said: str
) -> None:
    params = SamplingParams(extra_args={"kv_shallow": value})
    with pytest.raises(VLLMValidationError) as refused:
        read(settings_of(config(**options)), params)
    assert refused.value.parameter == "kv_shallow"
    assert said in str(refused.value)


@pytest.mark.parametrize("value", ["snapkv", None])
def test_pruned_shallow_layers_need_no_bands(value: Any) -> None:
    params = SamplingParams(extra_args={"kv_shallow": value})
    read(settings_of(config()), params)


def test_a_policy_is_needed_for_full_shallow_layers() -> None:
    params = SamplingParams(extra_args={"kv_shallow": "snapkv"})
    with pytest.raises(VLLMValidationError, match="started without --kv-policy"):
        read(settings_of(engine_config()), params)


def test_full_shallow_layers_must_fit_unpruned() -> None:
    """Each of the bands holds all of the prompt until the selection is known."""
    made = config(5 * POOL, bands=5)
    assert usable_blocks(settings_of(made)) == POOL
    full = {"kv_budget": 64, "kv_shallow": "full"}
    check(made, request(320, max_tokens=1, extra=full))
    message = str(refusal(made, request(321, max_tokens=1, extra=full)))
    assert "321 prompt tokens do not fit the KV pool of 320 tokens" in message
    assert "a kv_budget of 40 to 320 tokens without kv_shallow full" in message
    check(made, request(321, 64))
    message = str(refusal(made, request(300, max_tokens=22, extra=full)))
    assert "Lower max_tokens to 21, or send a kv_budget of 40 to 299" in message
    assert "without kv_shallow full" in message


def test_a_plan_takes_the_place_of_the_fields() -> None:
    """The engine core has nothing to read but the plan."""
    asked = request(200, 64, extra={"other": 1, "kv_policy": "snapkv"})
    params = check(config(), asked)
    assert params.extra_args is not None
    assert set(params.extra_args) == {"other", PLAN_KEY}
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    plan = plan_of(sent)
    assert plan is not None
    assert (plan.policy, plan.budget, plan.pruned_blocks) == ("snapkv", 64, 5)
    assert plan.kept_tokens == 40


@pytest.mark.parametrize("budget", [None, 64])
def test_a_plan_that_a_client_made_is_refused(budget: int | None) -> None:
    forged = {PLAN_KEY: {"policy": "asl", "pruned_blocks": 1 << 40}}
    error = refusal(config(), request(200, budget, extra=forged))
    assert error.parameter == PLAN_KEY


def test_before_the_pool_is_known_nothing_is_measured() -> None:
    params = check(config(blocks=None), request(900, max_tokens=100))
    assert params.max_tokens == 100


def test_a_prompt_that_fits_only_pruned() -> None:
    made = config()
    check(made, request(320, max_tokens=1))
    message = str(refusal(made, request(321, max_tokens=1)))
    assert "321 prompt tokens do not fit the KV pool of 320 tokens" in message
    assert "kv_budget of 40 to 320" in message
    check(made, request(900, 320, max_tokens=1))
    check(made, request(900, 64))


def test_a_prompt_that_does_not_even_fit_pruned() -> None:
    message = str(refusal(config(), request(900, 600)))
    assert "do not fit the KV pool of 320 tokens" in message


def test_a_prompt_that_fits_only_with_a_policy() -> None:
    check(config(), request(900, 64, policy="gemfilter"))
    message = str(refusal(config(), request(900, 64, policy="none")))
    assert "900 prompt tokens do not fit the KV pool" in message
    assert "kv_budget of 40 to 320 tokens and another kv_policy than none." in message


def test_max_tokens_beyond_the_pool_are_refused() -> None:
    made = config()
    # The last generated token is not written.
    assert check(made, request(300, max_tokens=21)).max_tokens == 21
    error = refusal(made, request(300, max_tokens=22))
    assert error.parameter == "max_tokens"
    assert "Lower max_tokens to 21, or send a kv_budget of 40 to 299" in str(error)
    check(made, request(300, 299, max_tokens=22))


@pytest.mark.parametrize(
    ("options", "tokens", "budget", "held"),
    [
        ({}, 900, 0.5, 420),  # 450 is rounded down to whole pruned blocks
        ({"budget": 600}, 900, None, 580),
        ({"budget": 0.9}, 900, None, 804),
        ({"budget": 64}, 900, 1.0, 900),
    ],
)
def test_the_budget_to_use_is_named_whoever_named_the_other(
    options: dict[str, Any], tokens: int, budget: Any, held: int
) -> None:
    made = config(**options)
    error = refusal(made, request(tokens, budget, max_tokens=1))
    kind = "prompt tokens" if held == tokens else "kept prompt tokens"
    assert f"{held} {kind} do not fit the KV pool of 320 tokens" in str(error)
    assert "a kv_budget of 40 to 320 tokens" in str(error)
    assert (error.parameter, error.value) == ("kv_budget", budget)
    check(made, request(tokens, 320, max_tokens=1))
    check(made, request(tokens, 40, max_tokens=1))


def test_no_budget_is_named_that_would_not_help() -> None:
    made = config(max_prefill_tokens=310)
    message = str(refusal(made, request(330, max_tokens=1)))
    assert message.startswith("330 prompt tokens do not fit")
    assert "Send a shorter prompt." in message
    # All but 19 tokens of the pool are for the answer: less than any budget.
    message = str(refusal(config(), request(100, max_tokens=302)))
    assert "Lower max_tokens to 221." in message


def test_a_pruned_prompt_and_its_answer_fit_or_are_told_by_how_much() -> None:
    error = refusal(config(), request(500, 200, max_tokens=200))
    assert "180 prompt tokens and max_tokens=200 do not fit" in str(error)
    assert "Lower max_tokens to 141, or send a kv_budget of 40 to 121" in str(error)
    check(config(), request(500, 200, max_tokens=141))
    check(config(), request(500, 121, max_tokens=200))


def test_max_tokens_up_to_the_models_length_are_lowered() -> None:
    made = config()
    assert check(made, request(300, max_tokens=724)).max_tokens == 21
    # 900 - 64 is 26.1 blocks: 27 go, 36 tokens stay.
    assert check(made, request(900, 64, max_tokens=124)).max_tokens == 124
    params = check(made, request(300, max_tokens=724, min_tokens=50))
    assert (params.max_tokens, params.min_tokens) == (21, 21)


def test_a_length_that_no_client_sent_is_lowered() -> None:
    """It comes from the model's generation config or is the API's default."""
    params = check(config(), request(300, max_tokens=100, min_tokens=50), None)
    assert (params.max_tokens, params.min_tokens) == (21, 21)
    assert check(config(), request(500, 200, max_tokens=200), None).max_tokens == 141
    assert check(config(), request(300, max_tokens=16), None).max_tokens == 16
    with pytest.raises(VLLMValidationError, match="do not fit the KV pool"):
        check(config(), request(400, max_tokens=16), None)


def test_a_length_is_refused_under_the_name_it_was_sent_by() -> None:
    for name in ("max_output_tokens", "max_completion_tokens"):
        with pytest.raises(VLLMValidationError) as refused:
            check(config(), request(300, max_tokens=22), name)
        assert refused.value.parameter == name
        assert f"Lower {name} to 21" in str(refused.value)


def test_without_a_policy_nothing_is_checked() -> None:
    made = engine_config(max_model_len=1024, block_size=BLOCK)
    made.cache_config.num_gpu_blocks = 2
    params = check(made, request(900, prompt_logprobs=1, max_tokens=500))
    assert params.max_tokens == 500


def test_usable_blocks() -> None:
    assert usable_blocks(settings_of(config(blocks=None))) is None
    assert usable_blocks(settings_of(config(10))) == 10


def test_a_front_end_of_several_engines_shares_their_sum() -> None:
    made = config()
    made.parallel_config.data_parallel_size = 4
    made.cache_config.num_gpu_blocks = 4 * (POOL + 1)
    assert usable_blocks(settings_of(made)) == POOL


@pytest.mark.parametrize("balancer", ["external", "hybrid"])
def test_a_front_end_of_some_engines_shares_their_sum(balancer: str) -> None:
    made = config()
    parallel = made.parallel_config
    parallel.data_parallel_size = 4
    parallel.data_parallel_size_local = 2
    setattr(parallel, f"data_parallel_{balancer}_lb", True)
    assert parallel.local_engines_only
    made.cache_config.num_gpu_blocks = 2 * (POOL + 1)
    assert usable_blocks(settings_of(made)) == POOL


def test_drafted_tokens_take_blocks_too() -> None:
    made = engine_config(
        {"policy": "asl"},
        block_size=BLOCK,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        },
    )
    made.cache_config.num_gpu_blocks = POOL + 1
    assert usable_blocks(settings_of(made)) == POOL - 1
