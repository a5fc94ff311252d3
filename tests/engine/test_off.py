"""Without a policy vLLM stays as it is, although asl_vllm is installed."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from asl_vllm import plugin
from asl_vllm.engine.frontend import launch
from asl_vllm.engine.worker import attention
from asl_vllm_testing import TINY_MODEL, warm
from asl_vllm_testing.vllm_configs import engine_args, engine_config

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
    assert config.parallel_config.worker_cls in launch.WORKERS.values()


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
        assert backend.get_path() == "asl_vllm.engine.worker.attention.Asl_CPU_ATTN"
        assert issubclass(backend.get_class(), attention.wrapped_backend("CPU_ATTN"))


def test_additional_config_of_others_is_ignored() -> None:
    config = engine_config(additional_config={"another_plugin": {"policy": "asl"}})
    assert config.kv_transfer_config is None
    assert config.additional_config == {"another_plugin": {"policy": "asl"}}


_COMPARE = """
import json, sys, types
import vllm.entrypoints.openai.chat_completion.protocol
import vllm.entrypoints.openai.completion.protocol
import vllm.entrypoints.openai.responses.protocol
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.input_processor
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

def seen():
    found = {}
    for module in [m for n, m in list(sys.modules.items()) if n.startswith("vllm.")]:
        for name, thing in list(vars(module).items()):
            if isinstance(thing, (type, types.FunctionType)):
                found[module.__name__, name] = thing
            if isinstance(thing, type) and thing.__module__ == module.__name__:
                for attribute, value in list(vars(thing).items()):
                    if callable(getattr(value, "__func__", value)):
                        owner = f"{thing.__module__}.{thing.__qualname__}"
                        found[owner, attribute] = value
    return found

from asl_vllm.engine import patching
wrapped = []
wrap_method = patching.wrap_method
def recording(owner, name, *rest):
    wrapped.append((patching._dotted(owner), name))
    return wrap_method(owner, name, *rest)
patching.wrap_method = recording

# As in the other tests: vLLM looks at the model in this process, which is quicker.
from vllm.model_executor.models import registry
registry._run_in_subprocess = lambda function: function()

before = seen()
from asl_vllm import plugin
plugin.register()
EngineArgs(model=sys.argv[1], max_model_len=256).create_engine_config()
after = seen()
changed = [key for key, value in before.items() if after.get(key) is not value]
ours = [n for n in sys.modules if n.startswith("asl_vllm.engine.")]
print(json.dumps({"changed": changed, "wrapped": wrapped, "ours": ours}))
"""


def test_off_only_the_wrapped_methods_differ() -> None:
    """In a fresh process: all of vLLM's functions, classes and their methods."""
    command = [sys.executable, "-c", _COMPARE, str(TINY_MODEL)]
    answer = warm.run(command, VLLM_PLUGINS="")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    wrapped = {tuple(pair) for pair in found["wrapped"]}
    assert len(wrapped) >= 8
    # pydantic builds its own methods of a request model anew with the added field.
    changed = {
        (owner, name)
        for owner, name in found["changed"]
        if not (name.startswith("__") and owner.endswith("Request"))
    }
    assert changed == wrapped
    # What changes how an engine works is not even imported.
    for name in ("attention", "blocks", "connector", "worker"):
        assert f"asl_vllm.engine.{name}" not in found["ours"]
