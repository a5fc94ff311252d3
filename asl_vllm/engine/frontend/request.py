"""Our fields in requests: of HTTP bodies, and where every request is planned.

Touch points: the fields, which `apis` adds to the pydantic request models in place,
are copied to ``extra_args`` by their ``to_sampling_params``, which refuses bad values
and notes in which field the client sent a length;
``InputProcessor.process_inputs``, through which HTTP, ``vllm_xargs`` and offline
requests all pass, reads them and puts a plan in their place.
"""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from asl_vllm.engine.frontend import apis
from asl_vllm.engine.frontend.admission import admit, read, refuse
from asl_vllm.engine.frontend.checked import CheckedPrompt
from asl_vllm.engine.frontend.places import AT_TOP, given_in, refuse_misplaced
from asl_vllm.engine.frontend.served import pruning, served
from asl_vllm.engine.patching import wrap_method
from asl_vllm.engine.settings import settings_of
from asl_vllm.selection.budget import shown

_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_LENGTH_FIELD = "asl_vllm_length_field"
"""Attribute of parameters: the field in which their client sent a length, or None."""


def _length_field(body: Any) -> str | None:
    """The field of a request model in which its client sent a length; None: in none.

    One that has its default counts as not sent: vLLM writes that of completions into
    bodies without one.
    """
    fields = type(body).model_fields
    return next(
        (
            name
            for name in _LENGTHS
            # Not as attributes: reading a deprecated one warns.
            if name in fields and vars(body)[name] != fields[name].default
        ),
        None,
    )


def _read_fields(model: type) -> None:
    """Copies our fields of a request model to the parameters that it makes."""

    def wrap(original: Any) -> Any:
        def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
            params: SamplingParams = original(self, *args, **kwargs)
            setattr(params, _LENGTH_FIELD, _length_field(self))
            given = given_in(self)
            if given:
                params.extra_args = {**(params.extra_args or {}), **given}
            settings = served()
            if settings is not None:
                # A bad value is refused where it enters: a background reply has begun
                # before the prompt is looked at, and a rendered one never gets there.
                read(settings, params)
                if settings.config.enabled:
                    refuse_misplaced(self.model_extra, AT_TOP)
            return params

        return to_sampling_params

    def wrap_beam(original: Any) -> Any:
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Beam search makes requests of its own, which would not carry them.
            for name, value in given_in(self).items():
                raise refuse(
                    f"{name} cannot be combined with beam search. Leave one of the two "
                    "out.",
                    shown(value),
                    name,
                )
            if pruning():
                refuse_misplaced(self.model_extra, AT_TOP)
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
            length = getattr(params, _LENGTH_FIELD, "max_tokens")
            admit(settings, given, request, length_field=length)
            return request

        return process_inputs

    wrap_method(
        InputProcessor,
        "process_inputs",
        ("self", "request_id", "prompt", "params"),
        wrap,
    )
