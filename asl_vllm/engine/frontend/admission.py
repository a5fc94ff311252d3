"""Which requests a pruning server admits: their budget, their prompt, the pool.

One validation for HTTP, ``vllm_xargs`` and offline requests, called by
`engine/frontend/request.py`: `read` before a prompt is looked at, `admit` after. What
is admitted carries its plan to the engine core. Whatever cannot run is refused with a
400 that says what to change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.engine import EngineCoreRequest

from asl_vllm.engine.frontend.fields import (
    BUDGET_FIELD,
    FIELDS,
    NAMES,
    POLICY_FIELD,
    REUSE_FIELD,
    SHALLOW_FIELD,
    given_fields,
    resembles,
)
from asl_vllm.engine.plan import PLAN_KEY, PrunePlan
from asl_vllm.engine.settings import Settings
from asl_vllm.selection.budget import budget_tokens, resolve_blocks, shown
from asl_vllm.selection.policies import installed_policies


def refuse(
    message: str, value: Any, parameter: str | None = BUDGET_FIELD
) -> VLLMValidationError:
    """A 400 that names the request field, by default ``kv_budget``; None: no one."""
    return VLLMValidationError(message, parameter=parameter, value=value)


def refuse_name(name: str, value: Any) -> VLLMValidationError:
    """A 400 for a name that was meant to be ours, with its value."""
    return refuse(
        f"{name} is no field of requests; got {shown(value)}. There are "
        f"{', '.join(NAMES)}.",
        shown(value),
        name,
    )


def read(settings: Settings, params: SamplingParams) -> dict[str, Any]:
    """A request's own fields, those it gives, by name; before its prompt is looked at.

    Raises:
        VLLMValidationError: a value is not allowed, or no policy is on, or this
            server cannot do it, or a name was meant to be a field and is none.
    """
    given = given_fields(params)
    for field in FIELDS:
        value = given.get(field.name)
        if value is None:
            continue
        if not settings.config.enabled:
            raise refuse(
                f"{field.name} was given, but this server prunes nothing: it was "
                f"started without --kv-policy. Leave {field.name} out or ask for a "
                "server with a policy.",
                shown(value),
                field.name,
            )
        try:
            field.validate(value, settings)
        except ValueError as error:
            raise refuse(str(error), shown(value), field.name) from None
    if given.get(SHALLOW_FIELD) == "full":
        _check_full(given.get(POLICY_FIELD) or settings.config.policy)
    if not settings.config.enabled:
        return given
    for name, value in (params.extra_args or {}).items():
        if name == PLAN_KEY:
            raise refuse(
                f"{PLAN_KEY} is written by the server alone. Send {BUDGET_FIELD} "
                "instead.",
                shown(params.extra_args),
                PLAN_KEY,
            )
        if value is not None and resembles(name):
            raise refuse_name(name, value)
    return given


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


def plan_request(
    settings: Settings, given: dict[str, Any], num_prompt_tokens: int
) -> PrunePlan | None:
    """The plan of a request with these fields; None when it is to be left alone.

    That is when neither it nor the server names a budget, and when the policy that
    goes, its own or else the server's, is ``none``.
    """
    config = settings.config
    budget = given.get(BUDGET_FIELD, config.budget)
    policy = given.get(POLICY_FIELD, config.policy)
    if not config.enabled or policy == "none" or budget is None:
        return None
    if isinstance(budget, int):
        # Beyond any prompt it may be too long a number for vLLM's messages.
        budget = min(budget, settings.max_model_len)
    blocks = resolve_blocks(
        budget,
        num_prompt_tokens=num_prompt_tokens,
        block_size=settings.block_size,
        window=config.window,
    )
    return PrunePlan(
        policy=policy,
        budget=budget,
        budget_tokens=budget_tokens(
            budget,
            num_prompt_tokens=num_prompt_tokens,
            minimum=settings.minimum_budget,
        ),
        num_prompt_tokens=num_prompt_tokens,
        pruned_blocks=blocks,
        block_size=settings.block_size,
        keep_shallow=given.get(SHALLOW_FIELD) == "full",
        reuse=given.get(REUSE_FIELD, settings.reuse),
    )


def admit(
    settings: Settings,
    given: dict[str, Any],
    request: EngineCoreRequest,
    *,
    length_field: str | None = "max_tokens",
) -> None:
    """Checks a request with these fields against its prompt and the pool.

    Its parameters get the plan in place of the fields; a default budget makes none for
    a request that cannot be pruned. Its ``max_tokens`` is lowered where it stands for
    "as many as fit", that is, where the client sent no ``length_field`` or where it
    reaches up to ``max_model_len``.

    Raises:
        VLLMValidationError: the request can never run on this server.
    """
    params = request.sampling_params
    if not settings.config.enabled or params is None:
        return
    prompt = request.prompt_token_ids
    num_prompt_tokens = len(prompt if prompt is not None else request.prompt_embeds)
    plan = plan_request(settings, given, num_prompt_tokens)
    obstacle = _obstacle(settings, request, num_prompt_tokens)
    if plan and plan.pruned_tokens and obstacle:
        if BUDGET_FIELD in given:
            raise refuse(obstacle, plan.budget)
        plan = None
    pruned = plan.pruned_tokens if plan else 0
    if plan and pruned:
        if params.skip_reading_prefix_cache:
            plan = dataclasses.replace(plan, reuse="none")
        # Left set, this would make the scheduler ignore connectors.
        params.skip_reading_prefix_cache = False
        # Should no layer be selected, all layers may hold the others for good.
        pruned = plan.absent_blocks * plan.block_size
    length = _length_that_fits(
        settings, given, params, num_prompt_tokens, pruned, not obstacle, length_field
    )
    if length is not None:
        params.max_tokens = length
        params.min_tokens = min(params.min_tokens, length)
    others = {k: v for k, v in (params.extra_args or {}).items() if k not in given}
    params.extra_args = others or None
    if plan:
        plan.send_with(params)


def _obstacle(
    settings: Settings, request: EngineCoreRequest, num_prompt_tokens: int
) -> str | None:
    """Why a request's prompt cannot be pruned, and what would help; None: it can."""
    params = request.sampling_params
    assert params is not None
    reason = None
    if (
        params.prompt_logprobs is not None
        or params.prompt_logprob_token_ids is not None
    ):
        reason = (
            "prompt_logprobs, which echo with logprobs asks for too: they need every "
            "prompt token in every layer"
        )
    elif request.prompt_embeds is not None:
        reason = "prompt embeddings"
    elif request.mm_features:
        reason = "multimodal inputs"
    elif request.resumable:
        reason = "streamed input"
    if reason:
        return (
            f"{BUDGET_FIELD} cannot be combined with {reason}. Leave one of the two "
            f"out; {BUDGET_FIELD}=1.0 prunes nothing."
        )
    capacity = settings.prefill_capacity
    if num_prompt_tokens > capacity:
        return (
            f"the prompt has {num_prompt_tokens} tokens; this server prunes prompts of "
            f"up to {capacity} (max_prefill_tokens). Send a shorter one, or no "
            f"{BUDGET_FIELD}."
        )
    return None


def _length_that_fits(
    settings: Settings,
    given: dict[str, Any],
    params: SamplingParams,
    num_prompt_tokens: int,
    pruned_tokens: int,
    prunable: bool,
    length_field: str | None,
) -> int | None:
    """``max_tokens`` where it must be lowered; None: it fits as it is."""
    pool_blocks = usable_blocks(settings)
    if pool_blocks is None:
        return None
    block_size = settings.block_size
    pool_tokens = pool_blocks * block_size
    held = num_prompt_tokens - pruned_tokens
    minimum = settings.minimum_budget
    if cdiv(held, block_size) > pool_blocks:
        kind = "kept prompt tokens" if pruned_tokens else "prompt tokens"
        remedy = "Send a shorter prompt"
        if prunable:
            remedy += f" or a {BUDGET_FIELD} of {minimum} to {pool_tokens} tokens"
            remedy += _without(given)
        raise refuse(
            f"{held} {kind} do not fit the KV pool of {pool_tokens} tokens. {remedy}.",
            given.get(BUDGET_FIELD),
            BUDGET_FIELD if prunable else None,
        )
    # The last generated token is never written to the cache.
    room = max(pool_tokens + pruned_tokens - num_prompt_tokens + 1, 1)
    assert params.max_tokens is not None
    if params.max_tokens <= room:
        return None
    reaches = num_prompt_tokens + params.max_tokens >= settings.max_model_len
    if length_field is None or reaches:
        return room
    remedy = f"Lower {length_field} to {room}"
    # A prompt that is pruned to this leaves room for all that was asked for.
    budget = pool_tokens - params.max_tokens + 1
    if prunable and budget >= minimum:
        remedy += f", or send a {BUDGET_FIELD} of {minimum} to {budget} tokens"
        remedy += _without(given)
    raise VLLMValidationError(
        f"{held} prompt tokens and {length_field}={params.max_tokens} do not fit the "
        f"KV pool of {pool_tokens} tokens. {remedy}.",
        parameter=length_field,
        value=params.max_tokens,
    )


def _without(given: dict[str, Any]) -> str:
    """What else must change for a smaller budget to help."""
    if given.get(POLICY_FIELD) == "none":
        return f" and another {POLICY_FIELD} than none"
    return (
        f" without {SHALLOW_FIELD} full" if given.get(SHALLOW_FIELD) == "full" else ""
    )


def usable_blocks(settings: Settings) -> int | None:
    """`Settings.usable_blocks` of one engine behind this front end; None: not sized."""
    total = settings.vllm_config.cache_config.num_gpu_blocks
    if not total:
        return None
    # vLLM adds up the pools of the engines that this process manages.
    parallel = settings.vllm_config.parallel_config
    local = parallel.local_engines_only
    engines = (
        parallel.data_parallel_size_local if local else parallel.data_parallel_size
    )
    return settings.usable_blocks(total // max(engines, 1))
