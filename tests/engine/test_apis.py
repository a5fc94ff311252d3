"""The table of endpoints against vLLM's application, and what it has the code do."""

from __future__ import annotations

import asyncio
import json
import sys
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.anthropic.protocol import (
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
    AnthropicUsage,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname

from asl_vllm.engine.frontend import run_batch, usage
from asl_vllm.engine.frontend.apis import APIS, NOWHERE
from asl_vllm_testing.moved import HAS_DECISIONS, make_arg_parser

HANDLERS = [api for api in APIS if api.handler]
IDLE = {
    *("/abort_requests", "/classify", "/collective_rpc", "/detokenize"),
    *("/fault_tolerance/apply", "/inference/v1/abort_requests"),
    *("/is_scaling_elastic_ep", "/pause", "/ping", "/resume", "/scale_elastic_ep"),
    *("/tokenize", "/v1/chat/completions/derender", "/v1/completions/derender"),
    *("/v1/load_lora_adapter", "/v1/messages/count_tokens"),
    *("/v1/responses/{response_id}/cancel", "/v1/unload_lora_adapter"),
}
"""Paths that take bodies and generate nothing."""
NEWER = set() if HAS_DECISIONS else {"/v1/decisions"}
"""Not in every supported line."""
HERE = [api for api in APIS if api.path not in NEWER]
MESSAGE = {"role": "user", "content": "the sky"}


@pytest.fixture(scope="module")
def routes() -> dict[str, APIRoute]:
    """Every path of a vLLM server that takes a POST."""
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--enable-scale-out", "--enable-lora"])
    app = build_app(args, ("generate", "render"), Mock(is_multimodal_model=False))
    return {
        route.path: route
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods
    }


def paths(api: Any) -> list[str]:
    return [path for path in api.path.split(", ") if path.startswith("/")]


def test_no_endpoint_of_vllm_is_left_out(routes: dict[str, APIRoute]) -> None:
    """A new one must be looked at: does it generate, and does it read our fields?"""
    listed = {path for api in HERE for path in paths(api)}
    assert listed <= routes.keys()
    assert routes.keys() - listed - IDLE == set()


@pytest.mark.parametrize(
    "api", [api for api in APIS if api.model], ids=lambda a: a.path
)
def test_models_are_those_of_the_routes(routes: dict[str, APIRoute], api: Any) -> None:
    model = resolve_obj_by_qualname(api.model)
    for path in paths(api):
        (parameter,) = routes[path].dependant.body_params
        assert parameter.field_info.annotation is model
    assert ("kv_budget" in model.model_fields) == (api.reads != NOWHERE)


@pytest.mark.skipif(not HAS_DECISIONS, reason="this line has no /v1/decisions")
def test_decisions_refuse_our_fields(routes: dict[str, APIRoute]) -> None:
    (parameter,) = routes["/v1/decisions"].dependant.body_params
    model = parameter.field_info.annotation
    with pytest.raises(ValidationError) as refused:
        model.model_validate({"kv_budget": 64})
    kinds = {error["loc"]: error["type"] for error in refused.value.errors()}
    assert kinds["kv_budget",] == "extra_forbidden"


def test_a_messages_fields_reach_its_chat_request() -> None:
    asked = AnthropicMessagesRequest(
        model="m", max_tokens=4, messages=[MESSAGE], kv_budget=True, kv_policy="none"
    )
    chat = AnthropicServingMessages._build_base_request(asked, [MESSAGE])
    assert isinstance(chat, ChatCompletionRequest)
    assert chat.kv_budget is True, "as it was sent, so that it is refused as such"
    assert (chat.kv_policy, chat.kv_shallow) == ("none", None)


def test_a_batchs_fields_reach_each_chat_request() -> None:
    asked = BatchChatCompletionRequest(messages=[[MESSAGE]], kv_budget=128)
    assert asked.to_chat_completion_request([MESSAGE]).kv_budget == 128


def test_token_requests_take_parameters_only() -> None:
    body: dict[str, Any] = {
        "token_ids": [1],
        "sampling_params": {"extra_args": {"kv_budget": 128}},
    }
    asked = GenerateRequest.model_validate({**body, "kv_budget": None})
    assert asked.sampling_params.extra_args == {"kv_budget": 128}
    with pytest.raises(ValidationError, match=r"got 64.*sampling_params\.extra_args"):
        GenerateRequest.model_validate({**body, "kv_budget": 64})


@pytest.mark.parametrize("api", HANDLERS, ids=lambda api: api.path)
def test_endpoints_that_read_no_field_refuse_them(
    monkeypatch: pytest.MonkeyPatch, routes: dict[str, APIRoute], api: Any
) -> None:
    """``routes`` because the handlers are wrapped where an application is built."""
    owner, name = api.handler
    handler = getattr(resolve_obj_by_qualname(owner), name)
    request = Mock(model_extra={"kv_policy": "snapkv"})
    with pytest.raises(VLLMValidationError, match="kv_policy is not read") as caught:
        asyncio.run(handler(Mock(), request, None))
    assert caught.value.parameter == "kv_policy"


def result(**report: Any) -> dict[str, Any]:
    return {
        "policy": "asl",
        "budget_tokens": 128,
        "selection_layer": 8,
        "kept_tokens": 123,
        "pruned_tokens": 288,
        "freed_blocks": 9,
        "skipped_token_layers": 2016,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
        **report,
    }


def test_a_messages_usage_has_the_proof() -> None:
    """Once its sequence has ended; before, as in a stream's first event, nothing."""
    usage.install()
    with usage.collect() as collected:
        sequence = collected.sequence()
        before = AnthropicUsage(input_tokens=1, output_tokens=0)
        sequence.end(result())
        after = AnthropicUsage(input_tokens=1, output_tokens=4)
    tokens = {"input_tokens": 1}
    assert before.model_dump(exclude_unset=True) == {**tokens, "output_tokens": 0}
    reply = AnthropicMessagesResponse(
        id="m", content=[], model="m", usage=after, stop_reason="end_turn"
    )
    for said in (
        reply.model_dump(exclude_none=True),
        json.loads(reply.model_dump_json(exclude_unset=True)),
    ):
        assert said["usage"]["kv_cache"]["pruned_tokens"] == 288


def test_the_batch_runner_collects_for_each_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lines run at the same time, in one task each."""
    runner = ModuleType("runner")

    async def run_request(serving_engine_func: Any, request: Any, tracker: Any) -> Any:
        collected = usage._current.get()
        assert collected is not None
        sequence = collected.sequence()
        await asyncio.sleep(0)
        sequence.end(result(kept_tokens=request))
        return UsageInfo(prompt_tokens=411)

    runner.run_request = run_request  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, run_batch.RUNNER, runner)
    run_batch.install()

    async def lines() -> list[BaseModel]:
        return await asyncio.gather(
            *(runner.run_request(None, kept, None) for kept in (1, 2))
        )

    kept = [
        line.model_dump()["kv_cache"]["kept_tokens"] for line in asyncio.run(lines())
    ]
    assert kept == [1, 2]
