"""Streams are validated before they begin, and the work is done once."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from asl_vllm.engine.frontend.checked import CheckedPrompt
from asl_vllm.engine.frontend.streams import checked
from asl_vllm.engine.plan import plan_of
from asl_vllm_testing.vllm_configs import engine_config

DELTA = RequestOutputKind.DELTA


@pytest.fixture
def processor() -> InputProcessor:
    made = engine_config({"policy": "asl", "window": 8}, block_size=32)
    made.cache_config.num_gpu_blocks = 5
    return InputProcessor(made, renderer_from_config(made))


@pytest.fixture
def validated(processor: InputProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that vLLM's own validation looked at."""
    lengths: list[int] = []
    validate = processor._validate_model_inputs

    def watched(encoder: Any, decoder: Any) -> Any:
        lengths.append(len(decoder["prompt_token_ids"]))
        return validate(encoder, decoder)

    monkeypatch.setattr(processor, "_validate_model_inputs", watched)
    return lengths


def asked(kind: RequestOutputKind = DELTA, **kw: Any) -> SamplingParams:
    fields = {"max_tokens": 4, "extra_args": {"kv_budget": 64}, **kw}
    return SamplingParams(output_kind=kind, **fields)


def begin(processor: InputProcessor, params: SamplingParams, **kw: Any) -> Any:
    return checked(processor, tokens_input([7] * 200), params, "a", kw)


def process(processor: InputProcessor, prompt: Any, params: Any, **kw: Any) -> Any:
    """As ``AsyncLLM.add_request`` calls it, which names every argument."""
    named = {"lora_request": None, "tokenization_kwargs": None, "priority": 0, **kw}
    return processor.process_inputs(
        "b", prompt, params, supported_tasks=("generate",), arrival_time=None, **named
    )


@pytest.mark.parametrize("n", [1, 3])
def test_a_streams_prompt_is_validated_once(
    processor: InputProcessor, validated: list[int], n: int
) -> None:
    params = asked(n=n)
    prompt = begin(processor, params, priority=0)
    assert validated == [200]
    request = process(processor, prompt, params, trace_headers={"a": "b"})
    assert validated == [200]
    assert (request.request_id, request.trace_headers) == ("b", {"a": "b"})
    assert request.sampling_params.n == n
    plan = plan_of(request.sampling_params)
    assert plan is not None
    assert plan.pruned_blocks == 5


def test_a_bad_stream_is_refused_when_its_generator_is_made(
    processor: InputProcessor,
) -> None:
    for bad in (asked(extra_args={"kv_budget": 3}), asked(extra_args=None)):
        with pytest.raises(VLLMValidationError):
            begin(processor, bad)


@pytest.mark.parametrize("kind", [k for k in RequestOutputKind if k != DELTA])
def test_what_is_not_streamed_is_left_to_vllm(
    processor: InputProcessor, validated: list[int], kind: RequestOutputKind
) -> None:
    prompt = begin(processor, asked(kind))
    assert not isinstance(prompt, CheckedPrompt)
    assert validated == []


def test_a_second_round_and_other_arguments_are_validated_anew(
    processor: InputProcessor, validated: list[int]
) -> None:
    """A prompt that is asked again must not come with the first one's request."""
    params = asked()
    prompt = begin(processor, params)
    first = process(processor, prompt, params)
    second = process(processor, prompt, params)
    assert first is not second
    assert validated == [200, 200]
    prompt = begin(processor, params)
    assert process(processor, prompt, params, priority=3).priority == 3
    other = asked(max_tokens=2)
    assert process(processor, prompt, other).sampling_params.max_tokens == 2
    assert validated == [200] * 5
