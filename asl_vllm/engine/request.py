"""``kv_budget`` in requests: the HTTP field, and one validation for all entries.

Touch points: the field is added to the pydantic request models in place and copied
to ``extra_args`` by their ``to_sampling_params``; ``InputProcessor.process_inputs``,
through which HTTP, ``vllm_xargs`` and offline requests all pass, validates it.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from asl_vllm.config import AslConfig
from asl_vllm.engine import settings
from asl_vllm.engine.patching import wrap_method
from asl_vllm.engine.plan import BUDGET_FIELD, PrunePlan, asked_budget, plan_request
from asl_vllm.selection.budget import BudgetError, minimum_budget, validate_budget

_FIELD_HELP = (
    "Tokens of the prompt whose KV cache is kept in each layer: an integer, or a "
    "share of the prompt in (0, 1]. null: the server's default. A budget of at "
    "least the prompt prunes nothing."
)
_FIELD_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "null"},
    ],
    "examples": [2048],
}


_served: VllmConfig | None = None


def serve(vllm_config: VllmConfig) -> None:
    """Tells the HTTP request models which engine this process serves.

    With it a bad ``kv_budget`` is refused before a streamed reply has begun, when
    the status can still be 400.
    """
    global _served
    _served = vllm_config


def refuse(message: str, value: Any) -> VLLMValidationError:
    """A 400 that names ``kv_budget``."""
    return VLLMValidationError(message, parameter=BUDGET_FIELD, value=value)


def check_budget(config: AslConfig, block_size: int, params: SamplingParams) -> None:
    """Validates a request's own budget before its prompt is looked at.

    Raises:
        VLLMValidationError: the value is not allowed, or no policy is on, or the
            request asks for something that a pruned prompt cannot give.
    """
    asked = asked_budget(params)
    if asked is None:
        return
    if not config.enabled:
        raise refuse(
            f"{BUDGET_FIELD} was given, but this server prunes nothing: it was started "
            f"without --kv-policy. Leave {BUDGET_FIELD} out or ask for a server with "
            "a policy.",
            repr(asked),
        )
    try:
        validate_budget(asked, minimum=minimum_budget(config.window, block_size))
    except BudgetError as error:
        raise refuse(str(error), repr(asked)) from None


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
    asked = asked_budget(params)
    plan = plan_request(config, asked, num_prompt_tokens, block_size)
    _cap_budget(vllm_config, params)
    pruned = plan.pruned_tokens if plan else 0
    if plan and pruned:
        _check_prunable(vllm_config, request, plan)
        # Pruned requests neither read nor fill the prefix cache; left set, this
        # would make the scheduler ignore connectors.
        params.skip_reading_prefix_cache = False
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
    if cdiv(held, block_size) > pool_blocks:
        minimum = minimum_budget(config.window, block_size)
        raise refuse(
            f"{held} prompt tokens do not fit the KV pool of {pool_tokens} tokens. "
            f"Send a shorter prompt or a {BUDGET_FIELD} of {minimum} to {pool_tokens} "
            "tokens.",
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
    raise VLLMValidationError(
        f"{held} prompt tokens and max_tokens={params.max_tokens} do not fit the KV "
        f"pool of {pool_tokens} tokens. Lower max_tokens to {room} or the "
        f"{BUDGET_FIELD}.",
        parameter="max_tokens",
        value=params.max_tokens,
    )


def usable_blocks(vllm_config: VllmConfig) -> int | None:
    """Blocks of one engine's pool that requests can hold; None before it is sized."""
    total = vllm_config.cache_config.num_gpu_blocks
    if not total:
        return None
    # Block 0 of each engine's pool is the null block.
    usable: int = total // _engines_behind(vllm_config) - 1
    if vllm_config.speculative_config is not None:
        drafted = 1 + vllm_config.num_speculative_tokens
        usable -= cdiv(drafted, vllm_config.cache_config.block_size)
    return usable


def _engines_behind(vllm_config: VllmConfig) -> int:
    """Engines whose pools vLLM adds up in this process's ``num_gpu_blocks``."""
    parallel = vllm_config.parallel_config
    if parallel.local_engines_only:
        return max(parallel.data_parallel_size_local, 1)
    return max(parallel.data_parallel_size, 1)


def _add_field(model: type) -> None:
    """Adds ``kv_budget`` to a pydantic request model; idempotent."""
    fields = model.model_fields  # type: ignore[attr-defined]
    if BUDGET_FIELD not in fields:
        info: FieldInfo = Field(  # type: ignore[assignment]
            default=None, description=_FIELD_HELP, json_schema_extra=_FIELD_SCHEMA
        )
        info.annotation = Any
        fields[BUDGET_FIELD] = info
        model.__annotations__[BUDGET_FIELD] = Any
        model.model_rebuild(force=True)  # type: ignore[attr-defined]

    def wrap(original: Any) -> Any:
        def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
            params: SamplingParams = original(self, *args, **kwargs)
            budget = getattr(self, BUDGET_FIELD)
            if budget is not None:
                params.extra_args = {**(params.extra_args or {}), BUDGET_FIELD: budget}
                if _served is not None:
                    config = settings.config_of(_served)
                    check_budget(config, _served.cache_config.block_size, params)
            return params

        return to_sampling_params

    def wrap_beam(original: Any) -> Any:
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Beam search makes requests of its own, which would not carry it.
            budget = getattr(self, BUDGET_FIELD)
            budget = (self.vllm_xargs or {}).get(BUDGET_FIELD, budget)
            if budget is not None:
                raise refuse(
                    f"{BUDGET_FIELD} cannot be combined with beam search. Leave one "
                    "of the two out.",
                    repr(budget),
                )
            return original(self, *args, **kwargs)

        return to_beam_search_params

    wrap_method(model, "to_sampling_params", ("self",), wrap)
    if hasattr(model, "to_beam_search_params"):
        wrap_method(model, "to_beam_search_params", ("self",), wrap_beam)


def install() -> None:
    """Adds the field and wraps the validation; idempotent."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for model in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        _add_field(model)

    def wrap(original: Any) -> Any:
        def process_inputs(
            self: InputProcessor,
            request_id: str,
            prompt: Any,
            params: Any,
            *args: Any,
            **kwargs: Any,
        ) -> EngineCoreRequest:
            config = settings.config_of(self.vllm_config)
            if isinstance(params, SamplingParams):
                check_budget(config, self.vllm_config.cache_config.block_size, params)
            request = original(self, request_id, prompt, params, *args, **kwargs)
            check_request(self.vllm_config, config, request)
            return request

        return process_inputs

    wrap_method(
        InputProcessor,
        "process_inputs",
        ("self", "request_id", "prompt", "params"),
        wrap,
    )
