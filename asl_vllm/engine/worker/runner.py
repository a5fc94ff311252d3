"""The connector's half in the workers: runs passes, reports what ended."""

from __future__ import annotations

import os

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorTransferResults,
)
from vllm.logger import init_logger
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from asl_vllm.engine.messages import StepOrders, StepReports
from asl_vllm.prefill import PrefillQueue, PrefillReport, RankLostError

logger = init_logger(__name__)


class WorkerSide:
    """Drives a `PrefillQueue`; each job is reported exactly once.

    A job that was dropped is reported as done too: only then does the scheduler take
    another one of that name.
    """

    queue: PrefillQueue | None = None

    def __init__(self) -> None:
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._reports: dict[str, PrefillReport] = {}

    def run(self, orders: StepOrders) -> None:
        """Drops and takes jobs, then runs this step's passes."""
        assert self.queue is not None
        self._done.update(filter(self.queue.abort, orders.drops))
        for job in orders.jobs:
            self.queue.add(job)
        if orders.paused or not len(self.queue):
            return
        try:
            # A pass waits for the device where a selection depends on it.
            with gpu_sync_allowed():
                outcomes = self.queue.step(orders.token_layers)
        except RankLostError:
            logger.exception("asl_vllm: this rank ends, others wait for it")
            # Not an exception: vLLM would report it for rank 0 only and go on to wait
            # for ranks that wait for this one. It does notice that a worker is gone.
            os._exit(1)
        for outcome in outcomes:
            self._done.add(outcome.request_id)
            if outcome.report is None:
                self._failed.add(outcome.request_id)
            else:
                self._reports[outcome.request_id] = outcome.report

    def take_results(self) -> KVConnectorTransferResults:
        """What ended since the last call, dropped jobs included."""
        results = KVConnectorTransferResults(
            finished_recving=self._done, failed_recving=self._failed
        )
        self._done, self._failed = set(), set()
        return results

    def take_reports(self) -> StepReports | None:
        """The prefills that ended since the last call, and how far others are."""
        assert self.queue is not None
        reports, self._reports = self._reports, {}
        progress = self.queue.progress()
        return StepReports(reports, progress) if reports or progress else None
