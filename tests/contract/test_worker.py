"""vLLM's workers and model runners, and the order in which they are set up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config.cache import CacheConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.mem_utils import MemorySnapshot, memory_profiling
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, record_kv_cache_layout

from asl_vllm.engine.frontend.launch import WORKERS
from asl_vllm.engine.worker.worker import PrefillWorkerMixin
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import parameters, source


@pytest.mark.parametrize("name", sorted(WORKERS))
def test_a_worker_is_named_by_its_path(name: str) -> None:
    stock: Any = resolve_obj_by_qualname(name)
    ours: Any = resolve_obj_by_qualname(WORKERS[name])
    assert issubclass(ours, stock)
    assert issubclass(ours, PrefillWorkerMixin)
    assert resolve_obj_by_qualname(WORKERS[name]) is ours


def test_worker_methods() -> None:
    assert issubclass(CPUWorker, Worker)
    assert parameters(Worker.load_model)[:1] == ("self",)
    assert parameters(Worker.initialize_from_config) == ("self", "kv_cache_config")
    assert parameters(Worker.compile_or_warm_up_model) == ("self",)
    for name in ("load_model", "initialize_from_config"):
        assert name not in vars(CPUWorker), "the mixin must come before it"


def test_the_worker_is_asked_for_the_specs() -> None:
    assert parameters(Worker.get_kv_cache_spec) == ("self",)
    assert "get_kv_cache_spec" not in vars(CPUWorker)
    assert "get_kv_cache_spec" in vars(PrefillWorkerMixin)
    executor = SimpleNamespace(collective_rpc=lambda method: [method])
    asked = Executor.get_kv_cache_specs(executor)  # type: ignore[arg-type]
    assert asked == ["get_kv_cache_spec"]


def test_a_gpu_worker_has_a_device() -> None:
    """In vLLM's text, since it cannot be made here; our own reads this attribute."""
    assert "self.device = " in source(Worker.init_device)


@pytest.mark.parametrize("runner", [CPUModelRunner, GPUModelRunner, GPUModelRunnerV2])
def test_model_runner_methods(runner: type) -> None:
    assert parameters(runner.get_model) == ("self",)  # type: ignore[attr-defined]
    assert parameters(runner.get_kv_cache_spec) == ("self",)  # type: ignore[attr-defined]


def test_memory_taken_while_loading_is_not_given_to_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is free after profiling counts, not what weights and passes took."""
    free = {"now": 100}

    def measure(snapshot: MemorySnapshot) -> None:
        snapshot.free_memory = free["now"]

    monkeypatch.setattr(MemorySnapshot, "measure", measure)
    monkeypatch.setattr(torch, "accelerator", Mock())
    before = MemorySnapshot(device="cpu")
    free["now"] = 70
    with memory_profiling(before, weights_memory=5) as result:
        free["now"] = 60
    assert result.non_kv_cache_memory == 100 - 60


def test_the_pool_is_sized_after_models_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So what a worker takes while it loads is not there any more."""
    calls: list[str] = []

    class Sized(Exception):
        pass

    class Loaded:
        """An executor: it is made with its workers' models loaded."""

        def __init__(self, config: Any) -> None:
            calls.append("load")

        def get_kv_cache_specs(self) -> Any:
            calls.append("specs")
            spec = FullAttentionSpec(
                block_size=128, num_kv_heads=2, head_size=32, dtype=torch.float32
            )
            return [{"layer": spec}]

        def get_supported_kv_cache_layouts(self) -> Any:
            return [[KVCacheLayout.LBHNC.name]]

        def set_kv_cache_layout(self, name: str, *more: Any) -> None:
            pass

        def collective_rpc(self, *_: Any, **__: Any) -> Any:
            return [None]

        def determine_available_memory(self) -> Any:
            calls.append("size")
            raise Sized

    config = engine_config()
    assert config.cache_config.num_gpu_blocks is None
    with pytest.raises(Sized):
        EngineCore(config, Loaded, log_stats=False)  # type: ignore[arg-type]
    assert calls == ["load", "specs", "size"]
    assert config.cache_config.num_gpu_blocks is None


def test_the_pools_layout_is_resolved() -> None:
    config = CacheConfig()
    record_kv_cache_layout(config, "LBHNC")
    assert config.get_resolved_kv_cache_layout() is KVCacheLayout.LBHNC


@pytest.mark.parametrize("asked", [None, 32])
def test_the_block_size_is_settled_after_loading(asked: int | None) -> None:
    """By what executors do after `load_model`; doing it twice changes nothing."""

    class Layer(AttentionLayerBase):
        impl = None

        def get_attn_backend(self) -> Any:
            return CPUAttentionBackend

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return None

    config = engine_config(block_size=asked)
    config.compilation_config.static_forward_context["layer"] = Layer()
    sizes = []
    for _ in range(2):
        current_platform.update_block_size_for_backend(config)
        sizes.append(config.cache_config.block_size)
    assert sizes == [asked or 128] * 2
