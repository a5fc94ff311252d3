"""Requests: their models, their validation and their replies."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
)
from vllm.entrypoints.openai.responses.protocol import (
    ResponsesRequest,
    ResponsesResponse,
)
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from asl_vllm.engine.frontend.fields import FIELDS
from asl_vllm.engine.patching import original_of
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import in_order, parameters, source

MODELS: dict[type, dict[str, Any]] = {
    CompletionRequest: {"prompt": "x"},
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "x"}]},
    ResponsesRequest: {"input": "x"},
}


def sampling_params(model: type, **body: Any) -> SamplingParams:
    request = model(**MODELS[model], **body)
    params: SamplingParams = request.to_sampling_params(16, {})
    return params


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_to_sampling_params(model: type) -> None:
    original = original_of(model, "to_sampling_params")
    assert original is not None
    assert parameters(original)[0] == "self"
    assert isinstance(sampling_params(model), SamplingParams)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("budget", [64, 0.5, 1, True, "64", [1], None])
def test_a_field_can_be_added_to_the_request_models(model: type, budget: Any) -> None:
    """It arrives as it was sent, for one validation to judge."""
    for field in FIELDS:
        extra = sampling_params(model, **{field.name: budget}).extra_args or {}
        assert extra.get(field.name) == budget
        assert type(extra.get(field.name)) is type(budget)
        assert {f.name for f in FIELDS} & extra.keys() <= {field.name}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_an_added_field_is_in_the_schema(model: type) -> None:
    properties = model.model_json_schema()["properties"]  # type: ignore[attr-defined]
    schema = properties["kv_budget"]
    assert [kind["type"] for kind in schema["anyOf"]] == ["integer", "number", "null"]
    for field in FIELDS:
        assert properties[field.name].items() >= field.schema.items()
        assert properties[field.name]["description"] == field.description
        assert properties[field.name]["default"] is None


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_extra_arguments_of_the_body_arrive_too(model: type) -> None:
    params = sampling_params(model, vllm_xargs={"kv_budget": 64, "other": 1})
    assert params.extra_args is not None
    assert params.extra_args["kv_budget"] == 64
    both = sampling_params(model, vllm_xargs={"other": 1}, kv_budget=32)
    assert both.extra_args is not None
    assert both.extra_args.items() >= {"other": 1, "kv_budget": 32}.items()


@pytest.mark.parametrize(
    "reply", [CompletionResponse, ChatCompletionResponse, ResponsesResponse]
)
def test_replies_have_kv_transfer_params(reply: type) -> None:
    assert "kv_transfer_params" in reply.model_fields  # type: ignore[attr-defined]
    assert "kv_transfer_params" in parameters(RequestOutput)
    assert "kv_transfer_params" in EngineCoreOutput.__struct_fields__


def test_beam_search_makes_requests_of_its_own() -> None:
    """Its parameters carry no extra arguments, so none arrives from the body."""
    names = {field.name for field in msgspec.structs.fields(BeamSearchParams)}
    assert "extra_args" not in names


def test_process_inputs() -> None:
    original = original_of(InputProcessor, "process_inputs")
    assert original is not None
    assert parameters(original)[:4] == ("self", "request_id", "prompt", "params")
    text = source(original)
    assert in_order(
        text,
        # The caller's parameters are not ours to change; the clone is.
        "sampling_params = params.clone()",
        "if sampling_params.max_tokens is None:",
        "sampling_params.max_tokens = self.model_config.max_model_len - prompt_len",
        "return EngineCoreRequest(",
    )
    assert "self.vllm_config = vllm_config" in source(InputProcessor.__init__)
    # The asynchronous form is made from the patched method.
    assert "make_async(self.process_inputs" in source(InputProcessor.__init__)


def test_engine_core_request_fields() -> None:
    assert {
        "prompt_token_ids",
        "prompt_embeds",
        "mm_features",
        "sampling_params",
        "resumable",
    } <= set(EngineCoreRequest.__struct_fields__)


def test_sampling_params_fields() -> None:
    params = SamplingParams(max_tokens=3, extra_args={"kv_budget": 5})
    assert params.clone().extra_args == {"kv_budget": 5}
    assert params.clone().max_tokens == 3
    assert params.prompt_logprobs is None
    assert params.min_tokens == 0
    assert params.skip_reading_prefix_cache is False
    assert SamplingParams(prompt_logprobs=1).skip_reading_prefix_cache is True


def test_samples_of_a_request_share_its_checked_parameters() -> None:
    assert "sampling_params = request.params" in source(ParentRequest.__init__)


def test_a_validation_error_is_the_clients() -> None:
    error = VLLMValidationError("too small", parameter="kv_budget", value=3)
    assert isinstance(error, VLLMClientError)
    assert str(error) == "too small (parameter=kv_budget, value=3)"


def test_the_front_end_adds_up_its_engines_blocks() -> None:
    assert in_order(
        source(MPClient._apply_ready_response),
        "num_gpu_blocks = vllm_config.cache_config.num_gpu_blocks or 0",
        "num_gpu_blocks += response.num_gpu_blocks",
        "vllm_config.cache_config.num_gpu_blocks = num_gpu_blocks",
    )


def test_a_front_end_may_manage_some_engines_only() -> None:
    """So the sum is over these, not over all data-parallel ranks."""
    config = engine_config().parallel_config
    assert config.local_engines_only is False
    assert in_order(
        source(MPClient.__init__),
        "num_ranks = dp_local_size if parallel_config.local_engines_only else dp_size",
        "self._apply_ready_response(payload)",
    )


def test_process_inputs_refuses_through_the_patch() -> None:
    """The refusal is raised before anything else of the request is looked at."""

    class Processor:
        vllm_config = engine_config()

    params = SamplingParams(extra_args={"kv_budget": 64})
    with pytest.raises(VLLMValidationError, match="started without --kv-policy"):
        InputProcessor.process_inputs(Processor(), "a", "x", params)  # type: ignore[arg-type]
    assert not asyncio.iscoroutinefunction(InputProcessor.process_inputs)
