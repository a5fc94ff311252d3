"""The KV connector through which pruned prompts enter vLLM's scheduler.

To the scheduler a pruned prompt is one whose first N-1 tokens are loaded
asynchronously from outside. This connector is that outside: its worker half runs
passes of the model's own layers each step and reports the request when it is done.

Touch point: `KVConnectorBase_V1` + `SupportsHMA`, vLLM's official interface.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from asl_vllm.engine.messages import StepOrders, StepReports
from asl_vllm.engine.scheduler import state, taking_back, telling
from asl_vllm.engine.scheduler.metrics import PruningPromMetrics, PruningStats
from asl_vllm.engine.scheduler.orders import SchedulerSide
from asl_vllm.engine.worker.runner import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from asl_vllm.prefill import PrefillQueue


class AslConnector(KVConnectorBase_V1, SupportsHMA):
    """Delegates to `SchedulerSide` in the scheduler and `WorkerSide` in workers."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler_side = SchedulerSide(vllm_config)
            state.install()
            taking_back.install()
            telling.install()
        else:
            self.worker_side = WorkerSide()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: nothing leaves this server."""
        return False

    # Scheduler half.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler_side.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        self.scheduler_side.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler_side.tokens_to_load(request)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if num_external_tokens:
            self.scheduler_side.on_allocated(request, blocks)
        else:
            self.scheduler_side.fills.on_allocated(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepOrders:
        return self.scheduler_side.orders(scheduler_output.total_num_scheduled_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler_side.on_output(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler_side.on_finished(request)

    # Metrics.

    def get_kv_connector_stats(self) -> PruningStats | None:
        # Ranks count nothing: what they report is joined in the scheduler.
        if self.role != KVConnectorRole.SCHEDULER:
            return None
        side = self.scheduler_side
        return side.tally.take(side.prefixes.num_pinned)

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> PruningStats:
        return PruningStats(copy.deepcopy(data))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PruningPromMetrics:
        return PruningPromMetrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    # Worker half.

    def bind_prefill_queue(self, queue: PrefillQueue) -> None:
        """Gives the worker half the queue it drives."""
        self.worker_side.queue = queue

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing yet: called before the forward in steps with a synchronous load.

        Passes may read what this step's forward writes, since vLLM's prefix cache has
        a block as soon as its tokens are scheduled.
        """

    def get_transfer_results(
        self, finished_req_ids: set[str]
    ) -> KVConnectorTransferResults:
        orders = self._get_connector_metadata()
        assert isinstance(orders, StepOrders)
        self.worker_side.run(orders)
        # Jobs of requests that ended are dropped by `StepOrders.drops`, in time.
        return self.worker_side.take_results()

    def build_connector_worker_meta(self) -> StepReports | None:
        return self.worker_side.take_reports()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
