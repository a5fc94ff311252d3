"""``kv_budget`` in requests: the HTTP field, and where every request is checked.

Touch points: the field is added to the pydantic request models in place and copied
to ``extra_args`` by their ``to_sampling_params``; ``InputProcessor.process_inputs``,
through which HTTP, ``vllm_xargs`` and offline requests all pass, validates it.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from asl_vllm.engine import settings
from asl_vllm.engine.admission import check_budget, check_request, refuse
from asl_vllm.engine.patching import wrap_method
from asl_vllm.engine.plan import BUDGET_FIELD

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
