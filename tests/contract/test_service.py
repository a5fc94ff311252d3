"""The HTTP service: routes, reply fields, what front ends ask of engines, metrics."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any
from unittest.mock import Mock

import pytest
import vllm.plugins
from fastapi import FastAPI
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorLogging,
    KVConnectorProm,
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponseUsage
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.plugins.endpoint_plugins.interface import (
    EndpointPlugin,
    attach_endpoint_plugins,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.buckets import build_1_2_5_buckets, histogram_buckets

from asl_server.app import KVEndpoints
from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.frontend import engines, repeated_ids, request, usage
from asl_vllm.engine.messages import STATE_METHOD
from asl_vllm.engine.patching import original_of
from asl_vllm.engine.scheduler import state
from asl_vllm.engine.scheduler.metrics import PruningPromMetrics, PruningStats
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import in_order, parameters, source


@pytest.fixture(autouse=True)
def _installed() -> None:
    usage.install()
    repeated_ids.install()


def original(owner: Any, name: str) -> Any:
    found = original_of(owner, name)
    assert found is not None
    return found


# Routes


def test_our_endpoints_are_vllms_kind_of_plugin() -> None:
    assert isinstance(KVEndpoints(), EndpointPlugin)
    for name in ("attach_router", "init_state"):
        assert parameters(getattr(KVEndpoints, name)) == parameters(
            getattr(EndpointPlugin, name)
        )
    assert inspect.iscoroutinefunction(KVEndpoints.init_state)


def test_endpoint_plugins_are_looked_up_when_an_application_is_built() -> None:
    """By name in the module, so that replacing the function there is enough."""
    assert in_order(
        source(attach_endpoint_plugins),
        "from vllm.plugins import load_endpoint_plugins",
        "load_endpoint_plugins(supported_tasks)",
        "plugin.attach_router(app)",
    )
    assert in_order(
        source(launcher.build_app),
        "register_api_routers(",
        "attach_endpoint_plugins(app, supported_tasks)",
        # Added later means further out: API keys are checked before our middleware.
        "init_entrypoints_middleware(",
    )


def routes_of(policy: dict[str, Any] | None) -> set[str]:
    request.serve(engine_config(policy))
    app = FastAPI()
    attach_endpoint_plugins(app, ("generate",))
    return set(app.openapi()["paths"])


def test_routes_are_added_only_when_a_policy_is_on() -> None:
    assert routes_of(None) == set()
    assert routes_of({"policy": "asl", "window": 8}) == {
        "/v1/kv/policies",
        "/v1/kv/stats",
    }


def test_endpoint_plugins_without_consent_are_not_loaded() -> None:
    """Why ours is handed over: ``VLLM_PLUGINS`` would have to name it."""
    loader = original(vllm.plugins, "load_endpoint_plugins")
    assert in_order(source(loader), "if envs.VLLM_PLUGINS is None:", "return []")


def test_api_keys_guard_v1() -> None:
    assert "/v1" in GUARDED_PREFIX


# Usage


def test_a_sequence_is_added_in_its_requests_context() -> None:
    assert in_order(
        source(original(AsyncLLM, "generate")), "await self.add_request(", "yield out"
    )
    for method in (AsyncLLM._add_request, original(AsyncLLM, "add_request")):
        assert "self.output_processor.add_request(" in source(method)
    add = original(OutputProcessor, "add_request")
    assert parameters(add)[:5] == (
        *("self", "request", "prompt", "parent_req", "request_index"),
    )
    assert "self.request_states[request_id] = req_state" in source(add)
    assert "self.prompt_len = " in source(RequestState.__init__)


def test_samples_keep_the_name_of_their_request() -> None:
    """So that the choices of a prompt stay together."""
    assert in_order(
        source(original(AsyncLLM, "add_request")),
        "self.input_processor.assign_request_id(request)",
        "copy(request)",
        "child_request.request_id = request_id",
    )


def test_a_sequences_result_passes_make_request_output() -> None:
    make = original(RequestState, "make_request_output")
    assert parameters(make)[:6] == (
        *("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason"),
        "kv_transfer_params",
    )
    assert in_order(
        source(OutputProcessor.process_outputs),
        "kv_transfer_params = engine_core_output.kv_transfer_params",
        "req_state.make_request_output(",
    )
    assert {reason.name for reason in FinishReason} == {
        *("STOP", "LENGTH", "ABORT", "ERROR", "REPETITION")
    }


def test_usage_models_take_fields_they_do_not_declare() -> None:
    for model in (UsageInfo, ResponseUsage):
        assert model.model_config["extra"] == "allow"
        assert "kv_cache" not in model.model_fields
        assert parameters(original(model, "__init__")) == ("self", "data")


@pytest.mark.parametrize(
    "method",
    [
        OpenAIServingCompletion.completion_stream_generator,
        OpenAIServingCompletion.request_output_to_completion_response,
        OpenAIServingChat.chat_completion_stream_generator,
        OpenAIServingChat.chat_completion_full_generator,
        OpenAIServingResponses.responses_full_generator,
    ],
)
def test_usage_is_made_after_the_last_output(method: Any) -> None:
    text = source(method)
    outputs = max(text.rfind("async for"), text.rfind("for final_res in"))
    assert max(text.rfind("UsageInfo("), text.rfind("ResponseUsage(")) > outputs


def test_generators_are_made_before_a_stream_begins() -> None:
    """Where a streamed request can still be refused with a 400."""
    assert parameters(original(AsyncLLM, "generate"))[:4] == (
        *("self", "prompt", "sampling_params", "request_id"),
    )
    for method, stream in (
        (OpenAIServingCompletion._create_completion, "completion_stream_generator("),
        (OpenAIServingChat._create_chat_completion, "chat_completion_stream_generator"),
    ):
        assert in_order(source(method), "self.engine_client.generate(", stream)
    loop = original(OpenAIServingResponses, "_generate_with_builtin_tools")
    assert parameters(loop)[:4] == (
        *("self", "request_id", "engine_input", "sampling_params"),
    )
    assert in_order(
        source(OpenAIServingResponses._create_responses),
        "self._generate_with_builtin_tools(",
        "self.responses_stream_generator(",
    )


def test_streams_ask_for_deltas() -> None:
    assert SamplingParams().output_kind != RequestOutputKind.DELTA


# Asking engines


def test_utilities_are_looked_up_by_name_in_every_engine() -> None:
    assert "getattr(self, method_name)" in source(EngineCoreProc._handle_client_request)
    assert parameters(AsyncMPClient.call_utility_all_async) == (
        *("self", "method", "args"),
    )
    assert "for engine in self.core_engines" in source(
        AsyncMPClient.call_utility_all_async
    )
    assert "self.engine_core = " in source(AsyncLLM.__init__)
    assert inspect.isclass(EngineClient)


def test_the_utility_is_added_once_and_is_no_name_of_vllm() -> None:
    state.install()
    state.install()
    assert getattr(EngineCore, STATE_METHOD) is state.engine_state


@pytest.mark.parametrize("failure", ["dead", "slow", "none"])
def test_an_engine_that_is_gone_is_a_503(failure: str) -> None:
    class Core:
        async def call_utility_all_async(self, method: str) -> list[Any]:
            if failure == "dead":
                raise EngineDeadError
            await asyncio.sleep(60)
            return []

    class Client:
        engine_core = Core()

    client: Any = None if failure == "none" else Client()
    with pytest.raises(GracefulHTTPError) as caught:
        asyncio.run(engines.engine_states(client, 0.01))
    assert caught.value.http_status == 503


# Metrics


def test_metrics_interface() -> None:
    for name in ("build_kv_connector_stats", "build_prom_metrics"):
        ours, theirs = getattr(AslConnector, name), getattr(KVConnectorBase_V1, name)
        assert parameters(ours) == parameters(theirs)
    assert issubclass(PruningStats, KVConnectorStats)
    assert issubclass(PruningPromMetrics, KVConnectorPromMetrics)
    for name in ("reset", "is_empty", "aggregate", "reduce", "to_dict"):
        assert hasattr(KVConnectorStats, name)
    assert "connector_cls.build_prom_metrics(" in source(KVConnectorProm.__init__)
    assert "build_kv_connector_stats(" in source(KVConnectorLogging.observe)


def test_statistics_go_to_one_front_end_after_the_connectors_update() -> None:
    assert in_order(
        source(Scheduler.update_from_output),
        "self._update_from_kv_xfer_finished(",
        "self.connector.get_kv_connector_stats()",
        "self.make_stats(",
        "next(iter(engine_core_outputs.values()), None)",
        "eco.scheduler_stats = stats",
    )


def test_buckets() -> None:
    assert build_1_2_5_buckets(100) == [1, 2, 5, 10, 20, 50, 100]
    assert 1.0 in histogram_buckets("time_to_first_token")


def test_a_live_requests_id_is_known_until_it_ends() -> None:
    """`repeated_ids` reads it before vLLM adds the request, without a pause between."""
    added = source(original(AsyncLLM, "add_request"))
    assert "self._add_request(" in added
    assert "self.external_req_ids[req_state.external_req_id]" in source(OutputProcessor)
    assert "del self.external_req_ids[" in source(OutputProcessor)
    again = source(original(OutputProcessor, "add_request"))
    assert "_update_streaming_request_state" in again


@pytest.mark.parametrize("plain", [False, True])
def test_an_id_that_is_taken_is_refused(
    monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """Only where ids are not randomised, since they cannot repeat elsewhere."""
    asked: list[str] = []

    async def add_request(self: Any, request_id: str, prompt: Any) -> None:
        asked.append(request_id)

    monkeypatch.setattr(AsyncLLM, "add_request", add_request)
    repeated_ids.install()
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", str(int(plain)))
    client: Any = Mock(output_processor=Mock(external_req_ids={"a": ["a"]}))
    asyncio.run(AsyncLLM.add_request(client, "b", "prompt"))
    if plain:
        with pytest.raises(VLLMValidationError, match="'a' is taken"):
            asyncio.run(AsyncLLM.add_request(client, "a", "prompt"))
    else:
        asyncio.run(AsyncLLM.add_request(client, "a", "prompt"))
    assert asked == (["b"] if plain else ["b", "a"])
