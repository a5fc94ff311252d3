"""Requests: their models, their validation and their replies."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, get_type_hints

import msgspec
import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.generative_scoring.serving import (
    GenerativeScoringRequest,
    ServingGenerativeScoring,
)
from vllm.entrypoints.generate.structured_decisions.protocol import (
    StructuredDecisionRequest,
)
from vllm.entrypoints.generate.structured_decisions.serving import (
    ServingStructuredDecisions,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
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
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreReadyResponse,
    EngineCoreRequest,
)
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from asl_vllm.engine.frontend.fields import FIELDS
from asl_vllm_testing.originals import original_of
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import parameters

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


def test_process_inputs_checks_a_clone_of_the_callers_parameters() -> None:
    """The caller's are not ours to change; the clone has all that was left out."""
    original = original_of(InputProcessor, "process_inputs")
    assert original is not None
    assert parameters(original)[:4] == ("self", "request_id", "prompt", "params")
    config = engine_config({"policy": "asl", "window": 8}, block_size=32)
    params = SamplingParams(max_tokens=None, extra_args={"kv_budget": 64})
    prompt = {"prompt_token_ids": [7] * 200}
    processor = InputProcessor(config)
    made = processor.process_inputs("a", prompt, params, ("generate",))  # type: ignore[arg-type]
    assert isinstance(made, EngineCoreRequest)
    assert made.prompt_token_ids == prompt["prompt_token_ids"]
    assert made.sampling_params is not None
    assert made.sampling_params.max_tokens == 256 - 200
    assert made.sampling_params.extra_args is not None
    assert params.max_tokens is None
    assert params.extra_args == {"kv_budget": 64}
    # Samples of one request share what was checked.
    made.external_req_id = "a"
    assert ParentRequest(made).sampling_params is made.sampling_params


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_default_length_of_the_model_is_not_the_clients(model: type) -> None:
    """Parameters carry from the body to the prompt's check which field was sent."""
    config = engine_config({"policy": "asl", "window": 8}, block_size=32)
    config.cache_config.num_gpu_blocks = 8  # 224 tokens
    processor = InputProcessor(config)
    field = "max_output_tokens" if model is ResponsesRequest else "max_tokens"

    def length(**body: Any) -> int | None:
        # vLLM takes the smaller of the client's and the generation config's.
        asked = model(**MODELS[model], **body)
        params = asked.to_sampling_params(body.get(field) or 40, {})
        prompt: Any = {"prompt_token_ids": [7] * 200}
        made = processor.process_inputs("a", prompt, params, ("generate",))
        assert made.sampling_params is not None
        return made.sampling_params.max_tokens

    assert length() == length(**{field: None}) == 25
    assert length(**{field: 25}) == 25
    with pytest.raises(VLLMValidationError, match=f"Lower {field} to 25") as refused:
        length(**{field: 40})
    assert refused.value.parameter == field


def test_the_asynchronous_form_is_the_patched_one() -> None:
    params = SamplingParams(extra_args={"kv_budget": 64})

    async def process() -> None:
        processor = InputProcessor(engine_config())
        await processor.process_inputs_async("a", "x", params, ("generate",))

    with pytest.raises(VLLMValidationError, match="started without --kv-policy"):
        asyncio.run(process())


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


def test_a_validation_error_is_the_clients() -> None:
    error = VLLMValidationError("too small", parameter="kv_budget", value=3)
    assert isinstance(error, VLLMClientError)
    assert str(error) == "too small (parameter=kv_budget, value=3)"


@pytest.mark.parametrize("before", [None, 5])
def test_the_front_end_adds_up_its_engines_blocks(before: int | None) -> None:
    """Those that it manages: not all ranks where the load balancer is external."""
    config = engine_config()
    assert config.parallel_config.local_engines_only is False
    config.cache_config.num_gpu_blocks = before
    client = SimpleNamespace(
        vllm_config=config,
        _effective_attention_block_sizes=set(),
        stats_update_address=None,
        _kv_event_sources={},
    )
    kinds = get_type_hints(EngineCoreReadyResponse)
    blank = {
        name: kind() if kind in (str, int, bool) else None
        for name, kind in kinds.items()
    }
    sizes = {"num_gpu_blocks": 7, "max_model_len": 256, "block_size": 32}
    answer = msgspec.msgpack.encode(EngineCoreReadyResponse(**{**blank, **sizes}))
    MPClient._apply_ready_response(client, answer)  # type: ignore[arg-type]
    assert config.cache_config.num_gpu_blocks == (before or 0) + 7


def test_process_inputs_refuses_through_the_patch() -> None:
    """The refusal is raised before anything else of the request is looked at."""

    class Processor:
        vllm_config = engine_config()

    params = SamplingParams(extra_args={"kv_budget": 64})
    with pytest.raises(VLLMValidationError, match="started without --kv-policy"):
        InputProcessor.process_inputs(Processor(), "a", "x", params)  # type: ignore[arg-type]
    assert not asyncio.iscoroutinefunction(InputProcessor.process_inputs)


def test_a_batch_is_split_into_chat_requests() -> None:
    """With the fields that it does not declare."""
    message: Any = {"role": "user", "content": "x"}
    batch = BatchChatCompletionRequest(messages=[[message]], others=64)
    chat = batch.to_chat_completion_request([message])
    assert isinstance(chat, ChatCompletionRequest)
    assert (chat.model_extra or {})["others"] == 64


def test_a_message_becomes_a_chat_request() -> None:
    """Field by field; what it does not declare is not handed on."""
    message: Any = {"role": "user", "content": "x"}
    body = {"model": "m", "max_tokens": 4, "messages": [message], "others": 64}
    asked = AnthropicMessagesRequest(**body, vllm_xargs={"kv_budget": 64})
    chat = AnthropicServingMessages._build_base_request(asked, [message])
    assert isinstance(chat, ChatCompletionRequest)
    assert chat.vllm_xargs == {"kv_budget": 64}
    assert not chat.model_extra


def test_handlers_of_endpoints_that_read_no_field() -> None:
    """Their models let extra fields through, to where they can be seen, or refuse."""
    for owner, name, model in (
        (
            ServingGenerativeScoring,
            "create_generative_scoring",
            GenerativeScoringRequest,
        ),
        (ServingStructuredDecisions, "create_decision", StructuredDecisionRequest),
        (ServingTokens, "serve_tokens", GenerateRequest),
    ):
        handler = original_of(owner, name) or getattr(owner, name)
        assert parameters(handler)[:3] == ("self", "request", "raw_request")
        assert asyncio.iscoroutinefunction(handler)
        # Since 0.33 one of the models refuses them itself.
        assert model.model_config["extra"] in ("allow", "forbid")


def test_token_requests_have_sampling_parameters() -> None:
    """And keep fields that they do not declare, once they may."""
    field = GenerateRequest.model_fields["sampling_params"]
    assert field.annotation is SamplingParams
    body = {"token_ids": [1], "sampling_params": {}, "others": 64}
    assert GenerateRequest.model_validate(body).model_extra == {"others": 64}
