"""What the rooms tell each other: the connector's two halves each step, and by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from asl_vllm.prefill import PrefillJob, PrefillProgress, PrefillReport

STATE_METHOD = "asl_vllm_state"
"""Method of ``EngineCore`` by which front ends ask for an engine's state."""


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler to workers: new jobs and the token-layers this step may spend.

    ``drops`` are requests whose jobs end before anything else is done: their blocks
    are somebody else's by now. A ``paused`` step runs no pass.
    """

    jobs: list[PrefillJob] = field(default_factory=list)
    token_layers: int = 0
    drops: set[str] = field(default_factory=set)
    paused: bool = False


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """Workers to scheduler: prefills that ended and those that run, by request id."""

    reports: dict[str, PrefillReport] = field(default_factory=dict)
    progress: dict[str, PrefillProgress] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReports:
        """Joins the ranks' reports; all must have chosen the same layer.

        The ranks run the same passes in the same step, so one's progress is all's.
        """
        assert isinstance(other, StepReports)
        joined = dict(self.reports)
        for request_id, report in other.reports.items():
            mine = joined.get(request_id, report)
            assert mine.selection_layer == report.selection_layer, (
                f"ranks disagree on the selection layer of {request_id}: "
                f"{mine.selection_layer} and {report.selection_layer}"
            )
            seconds = max(mine.seconds, report.seconds)
            joined[request_id] = replace(mine, seconds=seconds)
        return StepReports(joined, {**other.progress, **self.progress})
