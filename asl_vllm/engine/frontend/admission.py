"""Which requests a pruning server admits: their budget, their prompt, the pool.

One validation for HTTP, ``vllm_xargs`` and offline requests, called by
`engine/frontend/request.py`. Whatever cannot run is refused with a 400 that says what
to change.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.engine import EngineCoreRequest

from asl_vllm.config import AslConfig
from asl_vllm.engine import settings
from asl_vllm.engine.frontend.fields import FIELDS, given_fields
from asl_vllm.engine.plan import (
    BUDGET_FIELD,
    POLICY_FIELD,
    SHALLOW_FIELD,
    PrunePlan,
    asked_budget,
    asked_policy,
    asked_shallow,
    plan_for,
)
from asl_vllm.selection.budget import minimum_budget, shown
from asl_vllm.selection.policies import installed_policies


def refuse(
    message: str, value: Any, parameter: str = BUDGET_FIELD
) -> VLLMValidationError:
    """A 400 that names the request field, by default ``kv_budget``."""
    return VLLMValidationError(message, parameter=parameter, value=value)


def check_fields(config: AslConfig, block_size: int, params: SamplingParams) -> None:
    """Validates a request's own fields before its prompt is looked at.

    Raises:
        VLLMValidationError: a value is not allowed, or no policy is on, or this
            server cannot do it.
    """
    given = given_fields(params)
    for field in FIELDS:
        value = given.get(field.name)
        if value is None:
            continue
        if not config.enabled:
            raise refuse(
                f"{field.name} was given, but this server prunes nothing: it was "
                f"started without --kv-policy. Leave {field.name} out or ask for a "
                "server with a policy.",
                shown(value),
                field.name,
            )
        try:
            field.validate(value, config, block_size)
        except ValueError as error:
            raise refuse(str(error), shown(value), field.name) from None
    if given.get(SHALLOW_FIELD) == "full":
        _check_full(given.get(POLICY_FIELD) or config.policy)


def _check_full(policy: str) -> None:
    able = [name for name, kind in installed_policies().items() if kind.selects_once]
    if policy != "none" and policy not in able:
        raise refuse(
            f"{SHALLOW_FIELD}: got 'full' with policy {policy}; allowed with: "
            f"{', '.join(able)}, which select at one layer, so that those before it "
            "can keep every token. Leave it out or choose one of these.",
            "full",
            SHALLOW_FIELD,
        )


def check_request(
    vllm_config: VllmConfig, config: AslConfig, request: EngineCoreRequest
) -> None:
    """Checks a request against its prompt and the pool; may lower ``max_tokens``.

    ``max_tokens`` is lowered only where it stands for "as many as fit", that is,
    where it reaches up to ``max_model_len``.

    Raises:
        VLLMValidationError: the request can never run on this server.
    """
    params = request.sampling_params
    if not config.enabled or params is None:
        return
    block_size = vllm_config.cache_config.block_size
    prompt = request.prompt_token_ids
    num_prompt_tokens = len(prompt if prompt is not None else request.prompt_embeds)
    plan = plan_for(config, params, num_prompt_tokens, block_size)
    _cap_budget(vllm_config, params)
    pruned = plan.pruned_tokens if plan else 0
    if plan and pruned:
        _check_prunable(vllm_config, request, plan)
        # Pruned requests neither read nor fill the prefix cache; left set, this
        # would make the scheduler ignore connectors.
        params.skip_reading_prefix_cache = False
        if plan.keep_shallow:
            # Until it is prefilled each band holds all of it, and should no layer be
            # selected, for good.
            pruned = 0
    _check_fits(vllm_config, config, params, num_prompt_tokens, pruned)


def _cap_budget(vllm_config: VllmConfig, params: SamplingParams) -> None:
    """Bounds a budget beyond any prompt, so that it fits vLLM's messages."""
    asked = asked_budget(params)
    limit = vllm_config.model_config.max_model_len
    if isinstance(asked, int) and asked > limit:
        params.extra_args = {**(params.extra_args or {}), BUDGET_FIELD: limit}


def _check_prunable(
    vllm_config: VllmConfig, request: EngineCoreRequest, plan: PrunePlan
) -> None:
    params = request.sampling_params
    assert params is not None
    reason = None
    if (
        params.prompt_logprobs is not None
        or params.prompt_logprob_token_ids is not None
    ):
        reason = "prompt_logprobs, which need every prompt token in every layer"
    elif request.prompt_embeds is not None:
        reason = "prompt embeddings"
    elif request.mm_features:
        reason = "multimodal inputs"
    elif request.resumable:
        reason = "streamed input"
    if reason:
        raise refuse(
            f"{BUDGET_FIELD} cannot be combined with {reason}. Leave one of the two "
            f"out; {BUDGET_FIELD}=1.0 prunes nothing.",
            plan.budget,
        )
    capacity = settings.prefill_capacity(vllm_config)
    if plan.num_prompt_tokens > capacity:
        raise refuse(
            f"the prompt has {plan.num_prompt_tokens} tokens; this server prunes "
            f"prompts of up to {capacity} (max_prefill_tokens).",
            plan.budget,
        )


def _check_fits(
    vllm_config: VllmConfig,
    config: AslConfig,
    params: SamplingParams,
    num_prompt_tokens: int,
    pruned_tokens: int,
) -> None:
    pool_blocks = usable_blocks(vllm_config)
    if pool_blocks is None:
        return
    block_size = vllm_config.cache_config.block_size
    pool_tokens = pool_blocks * block_size
    held = num_prompt_tokens - pruned_tokens
    prunable = num_prompt_tokens <= settings.prefill_capacity(vllm_config)
    minimum = minimum_budget(config.window, block_size)
    if cdiv(held, block_size) > pool_blocks:
        kind = "kept prompt tokens" if pruned_tokens else "prompt tokens"
        remedy = "Send a shorter prompt"
        if prunable:
            remedy += f" or a {BUDGET_FIELD} of {minimum} to {pool_tokens} tokens"
            remedy += _without(params)
        raise refuse(
            f"{held} {kind} do not fit the KV pool of {pool_tokens} tokens. {remedy}.",
            asked_budget(params),
        )
    # The last generated token is never written to the cache.
    room = pool_tokens + pruned_tokens - num_prompt_tokens + 1
    assert params.max_tokens is not None
    if params.max_tokens <= room:
        return
    max_model_len = vllm_config.model_config.max_model_len
    if num_prompt_tokens + params.max_tokens >= max_model_len:
        params.max_tokens = max(room, 1)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        return
    remedy = f"Lower max_tokens to {room}"
    # A prompt that is pruned to this leaves room for all that was asked for.
    budget = pool_tokens - params.max_tokens + 1
    if prunable and budget >= minimum:
        remedy += f", or send a {BUDGET_FIELD} of {minimum} to {budget} tokens"
        remedy += _without(params)
    raise VLLMValidationError(
        f"{held} prompt tokens and max_tokens={params.max_tokens} do not fit the KV "
        f"pool of {pool_tokens} tokens. {remedy}.",
        parameter="max_tokens",
        value=params.max_tokens,
    )


def _without(params: SamplingParams) -> str:
    """What else must change for a smaller budget to help."""
    if asked_policy(params) == "none":
        return f" and another {POLICY_FIELD} than none"
    return f" without {SHALLOW_FIELD} full" if asked_shallow(params) == "full" else ""


def usable_blocks(vllm_config: VllmConfig) -> int | None:
    """Blocks a band of one engine's pool that requests can hold; None: not sized yet.

    All bands take theirs from the pool, and a request needs as many in each unless
    bands of it are pruned.
    """
    total = vllm_config.cache_config.num_gpu_blocks
    if not total:
        return None
    # Block 0 of each engine's pool is the null block.
    usable: int = total // _engines_behind(vllm_config) - 1
    usable //= settings.config_of(vllm_config).bands
    if vllm_config.speculative_config is not None:
        # Those of every step in flight, of which no one knows yet how many are right.
        steps = vllm_config.max_concurrent_batches
        drafted = steps * (1 + vllm_config.num_speculative_tokens)
        usable -= cdiv(drafted, vllm_config.cache_config.block_size)
    return usable


def _engines_behind(vllm_config: VllmConfig) -> int:
    """Engines whose pools vLLM adds up in this process's ``num_gpu_blocks``."""
    parallel = vllm_config.parallel_config
    if parallel.local_engines_only:
        return max(parallel.data_parallel_size_local, 1)
    return max(parallel.data_parallel_size, 1)
