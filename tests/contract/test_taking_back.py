"""vLLM's scheduler when a prompt that is being pruned is aborted, or put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm_testing.originals import original_of
from asl_vllm_testing.scheduler_host import (
    BLOCK,
    BUDGET,
    KEPT,
    PROMPT,
    Host,
    make_host,
    report_of,
)

ABORTED = RequestStatus.FINISHED_ABORTED


@pytest.fixture(params=[Scheduler, AsyncScheduler])
def host(request: pytest.FixtureRequest) -> Host:
    return make_host(scheduler_class=request.param)


def whole(host: Host, *, idle: bool = False) -> bool:
    check_integrity(host.scheduler.kv_cache_manager, idle=idle)
    return True


def finish(host: Host, *done: str) -> list[Any]:
    """Reports these jobs, then steps to the end; each request's last output."""
    last = {}
    host.step(done=set(done))
    for _ in range(60):
        last.update({output.request_id: output for output in host.outputs})
        if not host.scheduler.has_requests():
            break
        host.step()
    return [last[name] for name in sorted(last)]


@pytest.mark.parametrize("bands", [1, 5])
@pytest.mark.parametrize("ids", ["a", ["a"], None])
def test_an_aborted_loads_blocks_and_name_are_free_at_once(
    ids: str | Iterable[str] | None, bands: int
) -> None:
    host = make_host(bands=bands, pool_blocks=40 * bands)
    start = host.free
    host.add("a", shallow="full" if bands > 1 else None)
    host.step()
    assert host.free < start
    host.scheduler.finish_requests(ids, ABORTED)
    assert not host.scheduler.requests
    assert host.free == start
    assert whole(host, idle=True)
    assert host.scheduler.has_requests(), "the worker is still to be told"
    _, orders = host.step(done={"a"})
    assert orders.drops == {"a"}
    assert not host.scheduler.has_requests()
    _, orders = host.step()
    assert orders.drops == set()


def test_an_abort_takes_no_other_load_along(host: Host) -> None:
    host.add("a")
    other = host.add("b")
    host.step()
    host.scheduler.finish_requests(iter(["a"]), ABORTED)
    host.step(done={"a"})
    host.step()
    assert other.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    (output,) = finish(host, "b")
    assert output.kv_transfer_params["kept_tokens"] == KEPT


def test_vllm_keeps_an_aborted_load_until_it_is_reported(host: Host) -> None:
    """What the wrapped methods lift: ours has no reason to be kept."""
    stock = original_of(Scheduler, "finish_requests")
    assert stock is not None
    host.add("a")
    host.step()
    held = host.free
    stock(host.scheduler, "a", ABORTED)
    assert host.free == held
    assert "a" in host.scheduler.requests
    with pytest.raises(AssertionError, match="duplicate request id"):
        host.add("a")


@pytest.mark.parametrize("outcome", ["dropped", "done", "failed"])
def test_a_name_may_come_again_while_its_aborted_job_is_unreported(
    host: Host, outcome: str
) -> None:
    """Whatever becomes of the first job, it is none of the second request's."""
    host.add("a", budget=PROMPT - 1)
    step = host.scheduler.schedule()
    host.scheduler.finish_requests("a", ABORTED)
    again = host.add("a")
    # The report comes with the step that was under way, or after the order to drop.
    if outcome == "dropped":
        host.answer(step)
        step = host.scheduler.schedule()
        assert step.kv_connector_metadata.drops == {"a"}
        assert step.kv_connector_metadata.jobs == []
    report = report_of(7, 1)
    failed = {"a"} if outcome == "failed" else None
    host.answer(step, done={"a"}, failed=failed, report=report)
    assert again.status == RequestStatus.WAITING
    (state,) = host.connector.scheduler_side.pruned_requests()
    assert (state["state"], state["layer"], state["blocks_held"]) == ("waiting", 0, 0)
    _, orders = host.step()
    assert orders.drops == set()
    (job,) = orders.jobs
    assert job.kept_tokens == KEPT
    (output,) = finish(host, "a")
    assert str(output.finish_reason) == "length"
    assert output.kv_transfer_params["budget_tokens"] == BUDGET
    assert output.kv_transfer_params["selection_layer"] == 3
    assert whole(host, idle=True)


def test_a_name_may_come_again_without_a_budget(host: Host) -> None:
    host.add("a")
    step = host.scheduler.schedule()
    host.scheduler.finish_requests("a", ABORTED)
    host.add("a", budget=None, tokens=BLOCK)
    host.answer(step)
    late = host.scheduler.schedule()
    assert late.num_scheduled_tokens == {"a": BLOCK}
    host.answer(late, done={"a"})
    (output,) = finish(host)
    assert str(output.finish_reason) == "length"
    assert output.kv_transfer_params is None
    assert whole(host, idle=True)


def test_a_reset_puts_pruned_prompts_back(host: Host) -> None:
    """One in its prefill, one that ended it, one that decodes, and a plain one."""
    host.add("decodes", max_tokens=30)
    host.add("plain", budget=None, tokens=BLOCK, max_tokens=30)
    host.step()
    host.step(done={"decodes"})
    host.step()
    host.add("ended")
    host.add("prefilled")
    host.step()
    step = host.scheduler.schedule()
    host.answer(step, done={"ended"})
    assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert whole(host)
    assert host.free == 29
    held = host.connector.scheduler_side.pruned_requests()
    assert [state["blocks_held"] for state in held] == [0, 0, 0]
    waiting = [request.request_id for request in host.scheduler.waiting]
    assert waiting == ["plain", "decodes", "ended", "prefilled"]
    assert not host.scheduler.kv_holding_waiting
    _, orders = host.step(done={"prefilled"})
    assert orders.drops == {"prefilled"}
    assert [job.request_id for job in orders.jobs] == ["decodes"]
    host.step(done={"decodes"})
    host.step()
    outputs = finish(host, "ended", "prefilled")
    assert [str(output.finish_reason) for output in outputs] == ["length"] * 4
    assert whole(host, idle=True)


def test_a_reset_while_the_job_ends(host: Host) -> None:
    """The step under way reports a job whose blocks are free already."""
    request = host.add("a")
    host.step()
    step = host.scheduler.schedule()
    assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
    host.answer(step, done={"a"}, report=report_of(7, 1))
    assert request.status == RequestStatus.WAITING
    _, orders = host.step()
    assert orders.drops == set()
    assert [job.request_id for job in orders.jobs] == ["a"]
    (output,) = finish(host, "a")
    assert output.kv_transfer_params["selection_layer"] == 3
    assert whole(host, idle=True)


def test_a_preempted_request_that_is_put_back_is_resumed(host: Host) -> None:
    request = host.add("a")
    host.step()
    host.step(done={"a"})
    host.step()
    assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
    host.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert host.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.status == RequestStatus.PREEMPTED
    host.step(done={"a"})
    host.step()
    (output,) = finish(host, "a")
    assert str(output.finish_reason) == "length"
    assert request.num_output_tokens == 4


def test_a_reset_without_running_requests_takes_nothing(host: Host) -> None:
    request = host.add("a")
    host.step()
    assert not host.scheduler.reset_prefix_cache()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    _, orders = host.step()
    assert orders.drops == set()


def test_a_paused_engine_has_nothing_to_do_and_runs_no_pass(host: Host) -> None:
    host.add("a")
    host.add("plain", budget=None, tokens=BLOCK)
    _, orders = host.step()
    assert not orders.paused
    host.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not host.scheduler.has_requests()
    # A client that leaves has the engine step none the less.
    host.scheduler.finish_requests("plain", ABORTED)
    output, orders = host.step()
    assert output.total_num_scheduled_tokens == 0
    assert orders.paused
    host.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert host.scheduler.has_requests(), "a prompt that holds blocks is waited for"
    _, orders = host.step()
    assert not orders.paused
    host.scheduler.set_pause_state(PauseState.UNPAUSED)
    (output,) = finish(host, "a")
    assert str(output.finish_reason) == "length"


def test_pauses_and_resets_go_through_the_wrapped_methods() -> None:
    core: Any = Mock()
    EngineCore.reset_prefix_cache(core, True, False)
    core.scheduler.reset_prefix_cache.assert_called_once_with(True, False)
    EngineCore.pause_scheduler(core, "keep")
    EngineCore.resume_scheduler(core)
    paused = [call.args for call in core.scheduler.set_pause_state.call_args_list]
    assert paused == [(PauseState.PAUSED_ALL,), (PauseState.UNPAUSED,)]
    EngineCore.abort_requests(core, ["a"])
    core.scheduler.finish_requests.assert_called_once_with(["a"], ABORTED)


def test_other_connectors_are_let_be(host: Host) -> None:
    """An engine of the same process without a policy."""
    host.add("a")
    host.step()
    scheduler = host.scheduler
    del scheduler.connector.scheduler_side
    scheduler.connector.request_finished_all_groups = (  # type: ignore[method-assign]
        lambda request, block_ids: (False, None)
    )
    with pytest.raises(RuntimeError, match="not supported yet"):
        scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.finish_requests("a", ABORTED)
    assert "a" in scheduler.requests
