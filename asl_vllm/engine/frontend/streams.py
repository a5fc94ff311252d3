"""Refusing a streamed request before its reply begins, while its status can be 400.

vLLM validates a prompt when its generator is first asked for output; a stream has
begun by then. Here it is validated when the generator is made, and the result is handed
on with the prompt, so that the work is done once.

Touch points: wraps ``AsyncLLM.generate`` and
``OpenAIServingResponses._generate_with_builtin_tools``, which are called with the
rendered prompt before the stream begins.
"""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from asl_vllm.engine.frontend import usage
from asl_vllm.engine.frontend.checked import CheckedPrompt, is_rendered
from asl_vllm.engine.patching import together, wrap_method


@together()
def install() -> None:
    """Wraps the touch points; idempotent. For front ends with a policy only."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    wrap_method(
        AsyncLLM,
        "generate",
        ("self", "prompt", "sampling_params", "request_id"),
        _wrap_generate,
    )
    wrap_method(
        OpenAIServingResponses,
        "_generate_with_builtin_tools",
        ("self", "request_id", "engine_input", "sampling_params"),
        _wrap_responses,
    )


def checked(
    processor: InputProcessor,
    prompt: Any,
    params: SamplingParams,
    request_id: str,
    arguments: dict[str, Any],
) -> Any:
    """The prompt of a stream, validated; any other as it is.

    ``arguments`` are those by name that the generator was made with.

    Raises:
        VLLMValidationError: as ``process_inputs``.
    """
    streamed = params.output_kind == RequestOutputKind.DELTA
    if not streamed or not is_rendered(prompt) or isinstance(prompt, CheckedPrompt):
        return prompt
    passed = {k: v for k, v in arguments.items() if k in _PASSED}
    request = processor.process_inputs(
        request_id, prompt, params, ("generate",), **passed
    )
    return CheckedPrompt(prompt, request, params, passed)


_PASSED = (
    "lora_request",
    "tokenization_kwargs",
    "priority",
    "data_parallel_rank",
    "session_id",
    "kv_hints",
)
"""What a generator passes on to ``process_inputs``; trace headers come later."""


def _wrap_generate(original: Any) -> Any:
    def generate(
        self: Any,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if usage.collecting():
            prompt = checked(
                self.input_processor, prompt, sampling_params, request_id, kwargs
            )
        return original(self, prompt, sampling_params, request_id, *args, **kwargs)

    return generate


def _wrap_responses(original: Any) -> Any:
    def _generate_with_builtin_tools(
        self: Any,
        request_id: str,
        engine_input: Any,
        sampling_params: SamplingParams,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if usage.collecting():
            processor = self.engine_client.input_processor
            engine_input = checked(
                processor, engine_input, sampling_params, request_id, kwargs
            )
        return original(
            self, request_id, engine_input, sampling_params, *args, **kwargs
        )

    return _generate_with_builtin_tools
