"""Our fields in requests: of HTTP bodies, and where every request is planned.

Touch points: the fields, which `apis` adds to the pydantic request models in place,
are copied to ``extra_args`` by their ``to_sampling_params``, which refuses bad values;
``InputProcessor.process_inputs``, through which HTTP, ``vllm_xargs`` and offline
requests all pass, reads them and puts a plan in their place.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from asl_vllm.engine.frontend import apis
from asl_vllm.engine.frontend.admission import admit, read, refuse
from asl_vllm.engine.frontend.checked import CheckedPrompt
from asl_vllm.engine.frontend.fields import FIELDS
from asl_vllm.engine.patching import wrap_method
from asl_vllm.engine.settings import settings_of
from asl_vllm.selection.budget import shown

_served: VllmConfig | None = None


def serve(vllm_config: VllmConfig) -> None:
    """Tells the HTTP request models which engine this process serves."""
    global _served
    _served = vllm_config


def served() -> VllmConfig | None:
    """The engine that this process serves; None before one is configured."""
    return _served


def _read_fields(model: type) -> None:
    """Copies our fields of a request model to the parameters that it makes."""

    def wrap(original: Any) -> Any:
        def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
            params: SamplingParams = original(self, *args, **kwargs)
            values = {field.name: getattr(self, field.name) for field in FIELDS}
            given = {name: v for name, v in values.items() if v is not None}
            if given:
                params.extra_args = {**(params.extra_args or {}), **given}
            if _served is not None:
                # A bad value is refused where it enters: a background reply has begun
                # before the prompt is looked at, and a rendered one never gets there.
                read(settings_of(_served), params)
            return params

        return to_sampling_params

    def wrap_beam(original: Any) -> Any:
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Beam search makes requests of its own, which would not carry them.
            for field in FIELDS:
                value = getattr(self, field.name)
                value = (self.vllm_xargs or {}).get(field.name, value)
                if value is not None:
                    raise refuse(
                        f"{field.name} cannot be combined with beam search. Leave one "
                        "of the two out.",
                        shown(value),
                        field.name,
                    )
            return original(self, *args, **kwargs)

        return to_beam_search_params

    wrap_method(model, "to_sampling_params", ("self",), wrap)
    if hasattr(model, "to_beam_search_params"):
        wrap_method(model, "to_beam_search_params", ("self",), wrap_beam)


def install() -> None:
    """Adds the fields and wraps the validation; idempotent."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    apis.declare()
    for model in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        _read_fields(model)

    def wrap(original: Any) -> Any:
        def process_inputs(
            self: InputProcessor,
            request_id: str,
            prompt: Any,
            params: Any,
            *args: Any,
            **kwargs: Any,
        ) -> EngineCoreRequest:
            if isinstance(prompt, CheckedPrompt):
                ready = prompt.take(params, kwargs)
                if ready is not None:
                    ready.request_id = request_id
                    return ready
            settings = settings_of(self.vllm_config)
            given = read(settings, params) if isinstance(params, SamplingParams) else {}
            request: EngineCoreRequest = original(
                self, request_id, prompt, params, *args, **kwargs
            )
            admit(settings, given, request)
            return request

        return process_inputs

    wrap_method(
        InputProcessor,
        "process_inputs",
        ("self", "request_id", "prompt", "params"),
        wrap,
    )
