"""Turning an engine into a pruning one, when its arguments name a policy.

Touch point: wraps ``EngineArgs.create_engine_config``, the one place through which
``vllm serve``, `LLM` and `AsyncLLM` all pass.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from asl_vllm.config import AslConfig
from asl_vllm.engine.frontend import (
    apis,
    connectors,
    endings,
    options,
    repeated_ids,
    run_batch,
    served,
    standby,
    streams,
    usage,
)
from asl_vllm.engine.hashed import take_out_of_hash
from asl_vllm.engine.patching import UpstreamDriftError, check, wrap_method
from asl_vllm.engine.settings import config_of_additional
from asl_vllm.selection.policies import installed_policies

_WORKER_MODULE = "asl_vllm.engine.worker.worker"
WORKERS: dict[str, str] = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{_WORKER_MODULE}.AslCpuWorker",
    "vllm.v1.worker.gpu_worker.Worker": f"{_WORKER_MODULE}.AslGpuWorker",
}
"""vLLM's worker class -> the subclass that takes its place."""


def _take_worker(vllm_config: VllmConfig) -> None:
    from asl_vllm.engine.compat import UnsupportedError

    parallel = vllm_config.parallel_config
    if parallel.worker_cls in WORKERS.values():
        return
    if parallel.worker_cls not in WORKERS:
        raise UnsupportedError(
            "vLLM's CPU or GPU worker",
            f"worker class {parallel.worker_cls!r}",
            "drop --worker-cls, or run on an NVIDIA GPU or a CPU",
        )
    parallel.worker_cls = WORKERS[parallel.worker_cls]


def _release_backends() -> None:
    """Gives a later engine of this process, without a policy, stock attention."""
    attention = sys.modules.get("asl_vllm.engine.worker.attention")
    if attention is not None:
        attention.uninstall()


def _check_replies(config: AslConfig) -> None:
    """Refuses a policy if vLLM is not what reports in replies need.

    They are installed later, some when an HTTP application is built.
    """
    try:
        for module in (usage, endings, streams, apis, repeated_ids, run_batch):
            check(module.install)
    except UpstreamDriftError as drift:
        raise standby.refusal(config, str(drift)) from drift


def install() -> None:
    """Wraps ``EngineArgs.create_engine_config``; idempotent."""

    def wrap(original: Any) -> Any:
        def create_engine_config(
            self: EngineArgs, *args: Any, **kwargs: Any
        ) -> VllmConfig:
            config = config_of_additional(self.additional_config)
            if config.enabled:
                # Before the model is looked at: a bad one ends the start.
                installed_policies()
                _check_replies(config)
                options.check(self)
                connectors.take(self)
            else:
                _release_backends()
            vllm_config = original(self, *args, **kwargs)
            if config.enabled:
                from asl_vllm.engine import compat

                compat.check(vllm_config)
                _take_worker(vllm_config)
                take_out_of_hash(vllm_config)
                run_batch.install()
                endings.install()
            served.serve(vllm_config)
            return vllm_config

        return create_engine_config

    wrap_method(EngineArgs, "create_engine_config", ("self", "usage_context"), wrap)
