"""Fields of requests in places where nothing reads them, and in two at once."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from asl_vllm.engine.frontend import apis, served
from asl_vllm.engine.frontend.admission import read
from asl_vllm.engine.frontend.fields import NAMES, VLLMS, resembles
from asl_vllm.engine.settings import settings_of
from asl_vllm_testing.vllm_configs import engine_config

BUDGET = {"kv_budget": 128}
MESSAGE: Any = {"role": "user", "content": "the sky"}
MISPLACED: list[tuple[dict[str, Any], str, str]] = [
    ({"extra_body": BUDGET}, "extra_body", r"kv_budget is not read in extra_body\."),
    ({"extra_args": BUDGET}, "extra_args", r"kv_budget is not read in extra_args\."),
    (
        {"extra_body": {"sampling_params": {"extra_args": BUDGET}}},
        "extra_body",
        r"kv_budget is not read in extra_body\.sampling_params\.extra_args\.",
    ),
    (
        {"extra_body": {"kvPolicy": "asl"}},
        "extra_body",
        r"kvPolicy is not read in extra_body\.",
    ),
    ({"kv_buget": 128}, "kv_buget", "kv_buget is no field.* There are kv_budget, kv_"),
    ({"kvBudget": 128}, "kvBudget", "kvBudget is no field of requests; got 128"),
    ({"KV-Budget": 128}, "KV-Budget", "KV-Budget is no field of requests; got 128"),
]
IN_PARAMETERS = (
    {"sampling_params": BUDGET},
    "sampling_params",
    r"kv_budget is not read in sampling_params\.",
)
HARMLESS: dict[str, Any] = {
    "extra_body": {"top_k": 1, "kv_budget": None},
    "extra_args": [128],
    "kv_buget": None,
    "kv_transfer_params": {"a": 1},
    "kvetch": 1,
}


def completion(**fields: Any) -> Any:
    return CompletionRequest(prompt="x", **fields).to_sampling_params(4, {})


def chat(**fields: Any) -> Any:
    asked = ChatCompletionRequest(messages=[MESSAGE], **fields)
    return asked.to_sampling_params(4, {})


def response(**fields: Any) -> Any:
    return ResponsesRequest(input="x", **fields).to_sampling_params(4, {})


def batch(**fields: Any) -> Any:
    asked = BatchChatCompletionRequest(messages=[[MESSAGE]], **fields)
    return asked.to_chat_completion_request([MESSAGE]).to_sampling_params(4, {})


def message(**fields: Any) -> Any:
    asked = AnthropicMessagesRequest(
        model="m", max_tokens=4, messages=[MESSAGE], **fields
    )
    built = AnthropicServingMessages._build_base_request(asked, [MESSAGE])
    return built.to_sampling_params(4, {})


def beam(**fields: Any) -> Any:
    asked = CompletionRequest(prompt="x", use_beam_search=True, **fields)
    return asked.to_beam_search_params(4, {})


WAYS = [completion, chat, response, batch, message, beam]


@pytest.fixture(autouse=True)
def pruning() -> None:
    served.serve(engine_config({"policy": "asl", "window": 8}, block_size=32))
    apis.install()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("fields", "parameter", "said"), [*MISPLACED, IN_PARAMETERS])
def test_a_budget_that_would_not_be_read_is_refused(
    way: Any, fields: dict[str, Any], parameter: str, said: str
) -> None:
    with pytest.raises(VLLMValidationError, match=said) as refused:
        way(**fields)
    assert refused.value.parameter == parameter
    remedy = "Put it at the top of the body." in str(refused.value)
    assert remedy == ("is not read" in said)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_not_meant_to_be_ours_goes_through(way: Any) -> None:
    way(**HARMLESS)


@pytest.mark.parametrize("way", WAYS)
def test_a_server_without_a_policy_drops_them_as_vllm_does(way: Any) -> None:
    served.serve(engine_config())
    for fields, _, _ in [*MISPLACED, IN_PARAMETERS]:
        way(**fields)


@pytest.mark.parametrize(("fields", "parameter", "said"), MISPLACED)
def test_token_requests_refuse_what_is_beside_their_parameters(
    fields: dict[str, Any], parameter: str, said: str
) -> None:
    asked = GenerateRequest.model_validate(
        {"token_ids": [1], "sampling_params": {}, **fields}
    )
    with pytest.raises(VLLMValidationError, match=said) as refused:
        asyncio.run(ServingTokens.serve_tokens(Mock(), asked))
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        (BUDGET, r"kv_budget is not read in sampling_params\. Put it into sampling_"),
        ({"kv_buget": 1}, r"kv_buget is not read in sampling_params\."),
        ({"extra_body": BUDGET}, r"kv_budget is not read in sampling_params\.extra_b"),
    ],
)
def test_token_requests_refuse_what_their_parameters_drop(
    inside: dict[str, Any], said: str
) -> None:
    body = {"token_ids": [1], "sampling_params": inside}
    with pytest.raises(ValidationError, match=said):
        GenerateRequest.model_validate(body)
    served.serve(engine_config())
    GenerateRequest.model_validate(body)
    body["sampling_params"] = {"extra_args": inside, "top_k": 1}
    assert GenerateRequest.model_validate(body).sampling_params.top_k == 1


@pytest.mark.parametrize("name", ["kv_buget", "kv-budget", "kvBudget", "KV_BUDGET"])
@pytest.mark.parametrize("way", [completion, chat, response, message])
def test_misspelt_extra_arguments_are_refused(way: Any, name: str) -> None:
    """Of ``vllm_xargs``, and of offline requests."""
    with pytest.raises(VLLMValidationError, match="no field of requests") as refused:
        way(vllm_xargs={name: 128})
    assert refused.value.parameter == name
    settings = settings_of(engine_config({"policy": "asl"}))
    with pytest.raises(VLLMValidationError, match="There are kv_budget"):
        read(settings, SamplingParams(extra_args={name: 128}))
    read(settings, SamplingParams(extra_args={name: None, "others": 1}))


def test_names_of_vllm_are_not_taken_for_ours() -> None:
    assert not any(resembles(name) for name in (*NAMES, *VLLMS, "vllm_xargs", "key"))


@pytest.mark.parametrize("way", [completion, chat, response, message])
def test_extra_arguments_arrive_as_they_were_sent(way: Any) -> None:
    for value in (None, 64, 0.5, 1.0):
        extra = way(vllm_xargs={"kv_budget": value, "other": 1}).extra_args
        assert extra.get("kv_budget") == value
        assert type(extra.get("kv_budget")) is type(value)
        assert extra["other"] == 1
    for value, said in ((True, "got True"), ("128", "got '128'"), ([1], r"got \[1\]")):
        with pytest.raises(VLLMValidationError, match=said) as refused:
            way(vllm_xargs={"kv_budget": value})
        assert refused.value.parameter == "kv_budget"
    assert not way(vllm_xargs=None).extra_args
    with pytest.raises(ValidationError):
        way(vllm_xargs={"other": {"a": 1}})


@pytest.mark.parametrize("way", [completion, chat, response, message])
def test_a_field_in_both_places_must_agree(way: Any) -> None:
    def both(top: Any, inner: Any) -> Any:
        made = way(kv_budget=top, vllm_xargs={"kv_budget": inner})
        return made.extra_args["kv_budget"]

    assert both(128, 128) == both(None, 128) == both(128, None) == 128
    for top, inner in ((128, 64), (1, 1.0)):
        with pytest.raises(VLLMValidationError, match="Send it in one place") as no:
            both(top, inner)
        assert no.value.parameter == "kv_budget"
        assert f"got {top} in the body and {inner} in its vllm_xargs" in str(no.value)
