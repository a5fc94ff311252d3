"""The HTTP service: routes, reply fields, what front ends ask of engines, metrics."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import vllm.plugins
from fastapi import FastAPI
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers import run_batch as runner
from vllm.entrypoints.openai.responses.protocol import ResponseUsage
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
from vllm.exceptions import GracefulHTTPError
from vllm.plugins.endpoint_plugins.interface import (
    EndpointPlugin,
    attach_endpoint_plugins,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.buckets import build_1_2_5_buckets, histogram_buckets

from asl_server.app import KVEndpoints
from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.frontend import engines, repeated_ids, served, usage
from asl_vllm.engine.messages import STATE_METHOD
from asl_vllm.engine.scheduler import state
from asl_vllm.engine.scheduler.metrics import PruningPromMetrics, PruningStats
from asl_vllm_testing.originals import original_of
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import parameters


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


def routes_of(policy: dict[str, Any] | None) -> set[str]:
    served.serve(engine_config(policy))
    app = FastAPI()
    attach_endpoint_plugins(app, ("generate",))
    return set(app.openapi()["paths"])


def test_routes_are_added_only_when_a_policy_is_on() -> None:
    assert routes_of(None) == set()
    assert routes_of({"policy": "asl", "window": 8}) == {
        "/v1/kv/policies",
        "/v1/kv/stats",
    }


@pytest.mark.parametrize("named", [None, ["theirs"]])
def test_endpoint_plugins_without_consent_are_not_loaded(
    named: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why ours is handed over: ``VLLM_PLUGINS`` would have to name it."""
    made = SimpleNamespace(required_tasks=None)
    monkeypatch.setattr(
        vllm.plugins, "load_plugins_by_group", lambda _: {"theirs": lambda: made}
    )
    monkeypatch.setattr(vllm.plugins.envs, "VLLM_PLUGINS", named, raising=False)
    loaded = original(vllm.plugins, "load_endpoint_plugins")(("generate",))
    assert loaded == ([made] if named else [])


def test_api_keys_guard_v1() -> None:
    assert "/v1" in GUARDED_PREFIX


# Usage


def test_what_carries_a_sequence_from_its_request_to_its_result() -> None:
    """That it arrives, for each API, prompt and choice, is tested on servers."""
    add = original(OutputProcessor, "add_request")
    assert parameters(add)[:5] == (
        *("self", "request", "prompt", "parent_req", "request_index"),
    )
    make = original(RequestState, "make_request_output")
    assert parameters(make)[:6] == (
        *("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason"),
        "kv_transfer_params",
    )
    assert {reason.name for reason in FinishReason} == {
        *("STOP", "LENGTH", "ABORT", "ERROR", "REPETITION")
    }


def test_usage_models_take_fields_they_do_not_declare() -> None:
    for model in (UsageInfo, ResponseUsage):
        assert model.model_config["extra"] == "allow"
        assert "kv_cache" not in model.model_fields
        assert parameters(original(model, "__init__")) == ("self", "data")


def test_what_makes_a_streams_generator() -> None:
    """Where a streamed request is refused with a 400: servers show that it is."""
    assert parameters(original(AsyncLLM, "generate"))[:4] == (
        *("self", "prompt", "sampling_params", "request_id"),
    )
    loop = original(OpenAIServingResponses, "_generate_with_builtin_tools")
    assert parameters(loop)[:4] == (
        *("self", "request_id", "engine_input", "sampling_params"),
    )


def test_streams_ask_for_deltas() -> None:
    assert SamplingParams().output_kind != RequestOutputKind.DELTA


# Asking engines


def test_a_utility_is_called_by_name_in_every_engine() -> None:
    called: list[tuple[str, int]] = []

    async def call(method: str, *args: Any, engine: int) -> None:
        called.append((method, engine))

    client = SimpleNamespace(core_engines=[0, 1], _call_utility_async=call)
    asyncio.run(AsyncMPClient.call_utility_all_async(client, STATE_METHOD))  # type: ignore[arg-type]
    assert called == [(STATE_METHOD, 0), (STATE_METHOD, 1)]
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


def test_buckets() -> None:
    assert build_1_2_5_buckets(100) == [1, 2, 5, 10, 20, 50, 100]
    assert 1.0 in histogram_buckets("time_to_first_token")


@pytest.mark.parametrize("plain", [False, True])
def test_an_id_is_the_engines_once(
    monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """And the client's always."""
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", str(int(plain)))
    repeated_ids.share(1)
    first, again, other = (given_id(name) for name in ("again", "again", "other"))
    assert len({first, again, other}) == 3
    assert ((first, other) == ("again", "other")) == plain
    assert again.startswith("again-")
    # Another front end may have had it.
    repeated_ids.share(2)
    assert given_id("new").startswith("new-")
    repeated_ids.share(1)


def test_an_id_that_was_used_long_ago_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    monkeypatch.setattr(repeated_ids, "_REMEMBERED", 2)
    monkeypatch.setattr(repeated_ids, "_used", {})
    assert [given_id(name) for name in "abca"] == list("abca")
    assert given_id("c") != "c"


def given_id(name: str) -> str:
    request = InputProcessor(engine_config()).process_inputs(
        name, {"prompt_token_ids": [7]}, SamplingParams(max_tokens=4), ("generate",)
    )
    InputProcessor.assign_request_id(request)
    assert request.external_req_id == name
    return request.request_id


def test_the_batch_runner_calls_run_request_for_each_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its name in the module, so that replacing it there is enough."""
    asked: list[Any] = []
    monkeypatch.setattr(runner, "run_request", lambda *args: asked.append(args))
    line, handler = Mock(url="/v1/completions"), Mock()
    # 0.32 hands a tracker along, and what 0.33 has in one configuration.
    tracker = (
        [Mock()] if "tracker" in parameters(runner.handle_endpoint_request) else []
    )
    endpoint = {
        "url": "/v1/completions",
        "handler_getter": lambda: handler,
        "wrapper_fn": None,
    }
    how = [*tracker, bool, lambda: handler] if tracker else [endpoint]
    runner.handle_endpoint_request(line, *how)
    assert asked == [(handler, line, *tracker)]
