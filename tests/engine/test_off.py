"""Without a policy vLLM stays as it is, although asl_vllm is installed."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from asl_vllm import plugin
from asl_vllm.engine import attention
from tests.vllm_configs import engine_args, engine_config

OFF = [None, {}, {"policy": "none"}, {"policy": "none", "window": 8}]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry as a fresh process has it: an engine may have run in this one."""
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})


@pytest.mark.parametrize("policy", OFF, ids=str)
def test_off_leaves_the_configuration_alone(policy: dict[str, Any] | None) -> None:
    args = engine_args(policy)
    config = args.create_engine_config()
    assert config.kv_transfer_config is None
    assert args.kv_transfer_config is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_on_changes_the_connector_and_the_worker() -> None:
    config = engine_config({"policy": "asl"})
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_connector == "AslConnector"
    assert config.parallel_config.worker_cls == "asl_vllm.engine.worker.AslCpuWorker"


@pytest.mark.parametrize("policy", [*OFF, {"policy": "asl"}], ids=str)
@pytest.mark.usefixtures("backends")
def test_backends_are_untouched_outside_workers(policy: dict[str, Any] | None) -> None:
    """Even with a policy on: only the worker of a pruning engine overrides them."""
    plugin.register()
    engine_config(policy)
    for name in attention.WRAPPED_BACKENDS:
        backend = AttentionBackendEnum[name]
        assert not backend.is_overridden()
        assert backend.get_path() == backend.value


@pytest.mark.usefixtures("backends")
def test_backends_are_overridden_by_install() -> None:
    """The counterpart: what the test above would see if it happened."""
    for _ in range(2):
        attention.install()
        backend = AttentionBackendEnum.CPU_ATTN
        assert backend.get_path() == "asl_vllm.engine.attention.Asl_CPU_ATTN"
        assert issubclass(backend.get_class(), attention.wrapped_backend("CPU_ATTN"))


def test_additional_config_of_others_is_ignored() -> None:
    config = engine_config(additional_config={"another_plugin": {"policy": "asl"}})
    assert config.kv_transfer_config is None
    assert config.additional_config == {"another_plugin": {"policy": "asl"}}
