"""A worker's side of the connector over a queue that notes what it is asked for."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.messages import StepOrders
from asl_vllm.prefill import PrefillJob, PrefillOutcome, PrefillProgress
from asl_vllm_testing.scheduler_host import REPORT
from asl_vllm_testing.vllm_configs import engine_config

JOB = PrefillJob(
    request_id="a",
    policy="asl",
    prompt_token_ids=array("i", [1, 2, 3]),
    pruned_blocks=0,
    block_size=1,
    block_ids=[[5, 6]],
)


class Queue:
    """Stands in for `PrefillQueue`; notes what it is asked for."""

    def __init__(self) -> None:
        self.jobs: list[PrefillJob] = []
        self.steps: list[int] = []

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, job: PrefillJob) -> None:
        self.jobs.append(job)

    def abort(self, request_id: str) -> bool:
        return False

    def progress(self) -> dict[str, PrefillProgress]:
        return {}

    def step(self, token_layers: int) -> list[PrefillOutcome]:
        self.steps.append(token_layers)
        return [PrefillOutcome(self.jobs.pop().request_id, REPORT)]


def worker_connector() -> tuple[AslConnector, Queue]:
    """Our connector in a worker, and its queue."""
    config = engine_config({"policy": "asl"})
    connector = AslConnector(config, KVConnectorRole.WORKER, SimpleNamespace())
    queue = Queue()
    connector.bind_prefill_queue(queue)  # type: ignore[arg-type]
    return connector, queue


def scheduled(jobs: list[PrefillJob], *, has_sync_kv_loads: bool = False) -> Any:
    return SimpleNamespace(
        kv_connector_metadata=StepOrders(jobs, 100),
        has_sync_kv_loads=has_sync_kv_loads,
        finished_req_ids=set(),
    )
