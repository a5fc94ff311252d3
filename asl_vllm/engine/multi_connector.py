"""Our connector beside another one of vLLM's, which keeps blocks in host memory.

Pruned requests are ours alone. The other one knows of them, since it follows every
request that is scheduled, but has nothing to store of them, for they have no hashes,
and is never asked for them. It is told which blocks they take: it may still be
copying what those held before.

Touch points: a subclass of ``MultiConnector``; the set of a step's new blocks in
``OffloadingConnectorScheduler``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)

from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.scheduler.orders import SchedulerSide
from asl_vllm.engine.worker.runner import WorkerSide

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from asl_vllm.prefill import PrefillQueue

# Statistics of a connector inside another are found by its class's name.
KVConnectorFactory.register_connector(
    AslConnector.__name__, AslConnector.__module__, AslConnector.__name__
)


class AslMultiConnector(MultiConnector):
    """An `AslConnector` and an `OffloadingConnector`, in this order.

    Ours clears a new request's hashes before the other one sees them.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        ours, other = self._connectors
        assert isinstance(ours, AslConnector)
        assert isinstance(other, OffloadingConnector)
        self._ours, self._other = ours, other

    @property
    def scheduler_side(self) -> SchedulerSide:
        """Our half in the scheduler."""
        return self._ours.scheduler_side

    @property
    def worker_side(self) -> WorkerSide:
        """Our half in a worker."""
        return self._ours.worker_side

    def bind_prefill_queue(self, queue: PrefillQueue) -> None:
        """Gives our worker half the queue it drives."""
        self._ours.bind_prefill_queue(queue)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not self.scheduler_side.prunes(request.request_id):
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._requests_to_connector[request.request_id] = 0
        return self._ours.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens and self.scheduler_side.prunes(request.request_id):
            # vLLM 0.32 tells it when a request runs, and ours are written before.
            taken: Any = self._other.scheduler._current_batch_allocated_block_ids
            taken.update(
                block_id
                for row in blocks.get_block_ids()
                for block_id in row
                if block_id
            )
