"""vLLM's workers and model runners, and the order in which they are set up."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config.cache import CacheConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheLayout
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, record_kv_cache_layout

from asl_vllm.engine.frontend.launch import WORKERS
from asl_vllm.engine.worker.worker import PrefillWorkerMixin
from tests.contract.looking import in_order, parameters, source


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
    for name in ("load_model", "initialize_from_config"):
        assert name not in vars(CPUWorker), "the mixin must come before it"


def test_the_worker_is_asked_for_the_specs() -> None:
    assert parameters(Worker.get_kv_cache_spec) == ("self",)
    assert "get_kv_cache_spec" not in vars(CPUWorker)
    assert "get_kv_cache_spec" in vars(PrefillWorkerMixin)
    assert "collective_rpc('get_kv_cache_spec')" in source(Executor.get_kv_cache_specs)


def test_worker_attributes() -> None:
    assert "self.model_runner" in source(Worker.load_model)
    assert "self.device = " in source(Worker.init_device)
    assert "self.device = " in source(CPUWorker.init_device)


@pytest.mark.parametrize("runner", [CPUModelRunner, GPUModelRunner, GPUModelRunnerV2])
def test_model_runner_methods(runner: type) -> None:
    assert parameters(runner.get_model) == ("self",)  # type: ignore[attr-defined]
    assert parameters(runner.get_kv_cache_spec) == ("self",)  # type: ignore[attr-defined]


def test_memory_taken_while_loading_is_not_given_to_the_pool() -> None:
    """What is free after profiling counts, not what weights and passes took."""
    from vllm.utils.mem_utils import memory_profiling

    assert in_order(
        source(memory_profiling),
        "result.total_consumed = result.before_create.free_memory - "
        "result.after_profile.free_memory",
        "result.non_kv_cache_memory = result.total_consumed",
    )
    assert "memory_info().rss" in source(CPUWorker.determine_available_memory)


def test_the_pool_is_sized_after_models_are_loaded() -> None:
    assert in_order(
        source(EngineCore.__init__),
        "self.model_executor = executor_class(",
        "self._initialize_kv_caches(",
    )
    assert in_order(
        source(EngineCore._initialize_kv_caches),
        "self.model_executor.get_kv_cache_specs()",
        "self.model_executor.determine_available_memory()",
        "get_kv_cache_configs(",
    )


def test_the_connector_exists_once_the_pool_does() -> None:
    assert in_order(
        source(Worker.initialize_from_config),
        "ensure_kv_transfer_initialized(",
        "self.model_runner.initialize_kv_cache(",
    )
    assert "num_blocks" in parameters(KVCacheConfig)


def test_the_pools_layout_is_resolved_by_then() -> None:
    assert "record_kv_cache_layout(" in source(Worker.initialize_from_config)
    config = CacheConfig()
    record_kv_cache_layout(config, "LBHNC")
    assert config.get_resolved_kv_cache_layout() is KVCacheLayout.LBHNC
