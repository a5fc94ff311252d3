"""Host memory for vLLM's ``OffloadingConnector`` where there is no GPU.

vLLM's own copies need a device's streams. These are made late, as a busy stream makes
them: a block that is overwritten meanwhile is stored with what it then holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

CHUNKS = 4096
LATE = 3
"""Steps after which a copy is made, unless it is waited for."""


def host_memory(num_bytes: int = 1 << 26) -> dict[str, Any]:
    """A ``--kv-transfer-config`` with vLLM's connector and this host memory."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostMemorySpec",
            "spec_module_path": __name__,
            "cpu_bytes_to_use": num_bytes,
        },
    }


class HostMemorySpec(CPUOffloadingSpec):
    """vLLM's, less the copies; one block a chunk."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return HostMemoryWorker(
            [cache.tensor for cache in kv_caches.tensors],
            [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs],
            self.num_chunks,
        )


class HostMemoryWorker(OffloadingWorker):
    """Copies between blocks ``[blocks, bytes]`` and as many bytes a chunk."""

    def __init__(
        self, pools: list[Tensor], groups: list[list[int]], num_chunks: int
    ) -> None:
        self._pools = pools
        self._groups = groups
        self._host = [pool.new_zeros((num_chunks, *pool.shape[1:])) for pool in pools]
        self._waiting: dict[int, tuple[int, Callable[[], None]]] = {}
        self._done: list[int] = []
        self._step = 0
        self.stored: set[int] = set()
        """Blocks that were ever copied from."""

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        pairs = list(self._pairs(src_spec, dst_spec))
        self.stored.update(block for _, block, _ in pairs)

        def copy() -> None:
            for pool, block, chunk in pairs:
                self._host[pool][chunk] = self._pools[pool][block]

        self._waiting[job_id] = (self._step + LATE, copy)
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        pairs = list(self._pairs(dst_spec, src_spec))

        def copy() -> None:
            for pool, block, chunk in pairs:
                self._pools[pool][block] = self._host[pool][chunk]

        self._waiting[job_id] = (self._step + LATE, copy)
        return True

    def _pairs(
        self, blocks: GPULoadStoreSpec, chunks: Any
    ) -> Iterator[tuple[int, int, int]]:
        start = 0
        for pools, size in zip(self._groups, blocks.group_sizes, strict=True):
            end = start + size
            for pool in pools:
                for block, chunk in zip(
                    blocks.block_ids[start:end],
                    chunks.block_ids[start:end],
                    strict=True,
                ):
                    yield pool, int(block), int(chunk)
            start = end

    def get_finished(self) -> list[TransferResult]:
        self._step += 1
        due = {job for job, (step, _) in self._waiting.items() if step <= self._step}
        self.wait(due)
        done, self._done = self._done, []
        return [TransferResult(job_id=job, success=True) for job in done]

    def wait(self, job_ids: set[int]) -> None:
        # In order, as on one stream: a load may want what a store brings.
        for job in [job for job in self._waiting if job in job_ids]:
            self._waiting.pop(job)[1]()
            self._done.append(job)
