"""The KV-connector interface, and who calls it when."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from copy import copy

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group, kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
    supports_hma,
)
from vllm.forward_context import set_forward_context
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.messages import StepOrders, StepReports
from asl_vllm.prefill import PrefillProgress, PrefillReport
from asl_vllm_testing.scheduler_host import REPORT
from asl_vllm_testing.vllm_configs import engine_config
from asl_vllm_testing.worker_connector import JOB, Queue, scheduled, worker_connector
from tests.contract.looking import parameters

SIGNATURES = {
    "bind_kv_cache_manager": ("self", "kv_cache_manager"),
    "on_new_request": ("self", "request"),
    "get_num_new_matched_tokens": ("self", "request", "num_computed_tokens"),
    "update_state_after_alloc": ("self", "request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("self", "scheduler_output"),
    "update_connector_output": ("self", "connector_output"),
    "request_finished_all_groups": ("self", "request", "block_ids"),
    "start_load_kv": ("self", "forward_context", "kwargs"),
    "get_transfer_results": ("self", "finished_req_ids"),
    "build_connector_worker_meta": ("self",),
    "get_kv_connector_stats": ("self",),
    "wait_for_layer_load": ("self", "layer_name"),
    "save_kv_layer": ("self", "layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "wait_for_save": ("self",),
}


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", SIGNATURES)
def test_method_signatures(name: str) -> None:
    owner = SupportsHMA if hasattr(SupportsHMA, name) else KVConnectorBase_V1
    assert parameters(getattr(owner, name)) == SIGNATURES[name]
    assert parameters(getattr(AslConnector, name)) == SIGNATURES[name]


def test_only_methods_of_the_interface_are_overridden() -> None:
    ours = {
        name
        for name, value in vars(AslConnector).items()
        if inspect.isfunction(value) and not name.startswith("__")
    }
    assert ours - SIGNATURES.keys() == {"bind_prefill_queue"}


def test_nothing_abstract_is_left() -> None:
    assert not inspect.isabstract(AslConnector)
    assert supports_hma(AslConnector)
    assert isinstance(vars(KVConnectorBase_V1)["requires_kv_delivery"], property)
    assert parameters(KVConnectorBase_V1.__init__) == (
        "self",
        "vllm_config",
        "role",
        "kv_cache_config",
    )
    assert {role.name for role in KVConnectorRole} == {"SCHEDULER", "WORKER"}


def test_transfer_results_and_connector_output_fields() -> None:
    assert {"finished_recving", "failed_recving"} <= fields(KVConnectorTransferResults)
    assert {
        "finished_recving",
        "failed_recving",
        "kv_connector_worker_meta",
    } <= fields(KVConnectorOutput)
    assert {"total_num_scheduled_tokens", "finished_req_ids"} <= fields(SchedulerOutput)
    assert hasattr(KVCacheBlocks, "get_block_ids")


def test_messages_are_vllms_and_can_be_sent() -> None:
    assert issubclass(StepOrders, KVConnectorMetadata)
    assert issubclass(StepReports, KVConnectorWorkerMetadata)
    orders = StepOrders([JOB], 100)
    assert pickle.loads(pickle.dumps(orders)) == orders


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Model runner V1 finds our connector; its queue. V2 has tests of its own."""
    connector, queue = worker_connector()
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", connector)
    assert get_kv_transfer_group() is connector
    return queue


@pytest.mark.parametrize("synchronous", [False, True])
def test_passes_run_after_the_steps_forward_and_their_results_are_taken(
    worker: Queue, synchronous: bool
) -> None:
    """Also where a load is synchronous: a pass may read what the forward writes."""
    step = KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(
        scheduled([JOB], has_sync_kv_loads=synchronous)
    )
    with set_forward_context(None, engine_config()):
        with step as output:
            assert not worker.steps
        assert worker.steps == [100]
    assert output is not None
    assert output.finished_recving == {"a"}
    assert output.failed_recving == set()
    assert isinstance(output.kv_connector_worker_meta, StepReports)
    assert output.kv_connector_worker_meta.reports == {"a": REPORT}


def test_passes_run_in_a_step_without_forward(worker: Queue) -> None:
    result = KVConnectorModelRunnerMixin.kv_connector_no_forward(
        scheduled([JOB]), engine_config()
    )
    assert worker.steps == [100]
    assert result.kv_connector_output is not None
    assert result.kv_connector_output.finished_recving == {"a"}


def rank_output(
    done: set[str], failed: set[str] = frozenset(), seconds: float = 1.0
) -> ModelRunnerOutput:
    reports = {name: PrefillReport(3, 5, 6, seconds) for name in done - failed}
    output = ModelRunnerOutput.with_kv_conn_output_only(
        KVConnectorOutput(
            finished_recving=done,
            failed_recving=set(failed),
            kv_connector_worker_meta=StepReports(reports) if reports else None,
        )
    )
    # An empty one is vLLM's shared constant, which the aggregator would write to.
    return copy(output)


def joined(*outputs: ModelRunnerOutput) -> KVConnectorOutput:
    output = KVOutputAggregator(len(outputs)).aggregate(list(outputs))
    assert output is not None
    assert output.kv_connector_output is not None
    return output.kv_connector_output


def test_ranks_reports_are_aggregated() -> None:
    output = joined(rank_output({"a"}), rank_output({"a"}, seconds=2.0))
    assert output.finished_recving == {"a"}
    assert not output.failed_recving
    reports = output.kv_connector_worker_meta
    assert isinstance(reports, StepReports)
    assert reports.reports["a"].seconds == 2.0


def test_ranks_progress_is_aggregated() -> None:
    """All ranks run the same passes; the one that reports an end has no progress."""
    progress = {"b": PrefillProgress(4, None)}
    first, second = rank_output({"a"}), rank_output({"a"})
    for output in (first, second):
        assert output.kv_connector_output is not None
        reports = output.kv_connector_output.kv_connector_worker_meta
        assert isinstance(reports, StepReports)
        reports.progress = dict(progress)
    reports = joined(first, second).kv_connector_worker_meta
    assert isinstance(reports, StepReports)
    assert reports.progress == progress
    assert list(reports.reports) == ["a"]


def test_a_job_has_ended_when_it_has_on_every_rank() -> None:
    aggregator = KVOutputAggregator(2)
    first = aggregator.aggregate([rank_output({"a"}), rank_output(set())])
    assert first is not None
    assert first.kv_connector_output is not None
    assert first.kv_connector_output.finished_recving is None
    second = aggregator.aggregate([rank_output(set()), rank_output({"a"})])
    assert second is not None
    assert second.kv_connector_output is not None
    assert second.kv_connector_output.finished_recving == {"a"}


def test_a_job_that_failed_on_one_rank_failed() -> None:
    output = joined(rank_output({"a"}), rank_output({"a"}, {"a"}))
    assert output.finished_recving == output.failed_recving == {"a"}
