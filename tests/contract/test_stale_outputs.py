"""A request id that is used again while a step in flight holds the first request."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm_testing.scheduler_host import PROMPT, Host, make_host

SHORT = 20
ENDS = ["aborted", "reset and aborted", "stopped"]


def begun(budget: int | None, *, stops: bool) -> Host:
    """The next step gives "a" its first token, which ends it if it ``stops``."""
    host = make_host(scheduler_class=AsyncScheduler)
    stop = {"stop_token_ids": [1]} if stops else {}
    ask(host, budget, max_tokens=50, **stop)
    if budget is not None:
        host.step()
        host.step(done={"a"})
    return host


def ask(host: Host, budget: int | None, **sampling: Any) -> Request:
    """One without a budget fits into a step."""
    tokens = PROMPT if budget else SHORT
    return host.add("a", budget, tokens=tokens, **sampling)


def end(host: Host, how: str) -> None:
    scheduler = host.scheduler
    if how == "reset and aborted":
        assert scheduler.reset_prefix_cache(reset_running_requests=True)
    if how != "stopped":
        scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert "a" not in scheduler.requests


def tokens_until_its_end(host: Host, request: Request) -> int:
    given, done = 0, None
    while not request.is_finished():
        host.step(done=done)
        given += sum(len(part.new_token_ids) for part in host.outputs)
        loading = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        done = {"a"} if loading and done is None else None
    return given


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("first", [None, 100])
@pytest.mark.parametrize("then", [None, 100])
def test_old_output_is_not_the_new_requests(
    how: str, first: int | None, then: int | None
) -> None:
    host = begun(first, stops=how == "stopped")
    output = host.scheduler.schedule()
    ahead = host.scheduler.schedule()
    assert ahead.num_scheduled_tokens == {"a": 1}
    host.answer(output)
    end(host, how)
    again = ask(host, then)
    host.answer(ahead)
    assert host.outputs == []
    assert tokens_until_its_end(host, again) == 4
    assert again.num_stale_output_tokens == again.num_in_flight_tokens == 0
    assert not host.scheduler.requests
    check_integrity(host.scheduler.kv_cache_manager, idle=True)


def test_the_new_request_does_not_wait_for_it() -> None:
    host = begun(None, stops=False)
    output = host.scheduler.schedule()
    end(host, "aborted")
    again = ask(host, None)
    ahead = host.scheduler.schedule()
    assert ahead.num_scheduled_tokens == {"a": SHORT}
    host.answer(output)
    assert (again.num_stale_output_tokens, host.outputs) == (0, [])
    host.answer(ahead)
    assert 1 + tokens_until_its_end(host, again) == 4


def test_nothing_stays_of_an_id_that_is_not_used_again() -> None:
    host = begun(None, stops=False)
    output = host.scheduler.schedule()
    end(host, "aborted")
    stale = host.connector.scheduler_side.stale_outputs
    assert list(stale._tokens) == ["a"]
    host.answer(output)
    assert not stale._tokens
