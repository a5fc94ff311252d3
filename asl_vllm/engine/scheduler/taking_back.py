"""Taking back prompts that are being pruned: aborts, cache resets and pauses.

To vLLM a load from outside may write to its blocks at any time. So it keeps an aborted
request, and its id, until the load is reported, and cannot reset its cache meanwhile.
Passes write in the order of the engine's steps instead, and the step that gives blocks
to somebody else tells workers first to drop the job. So both happen at once here, as
they do for other requests.

Touch point: wraps ``finish_requests``, ``reset_prefix_cache`` and ``set_pause_state``
of vLLM's `Scheduler`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from asl_vllm.engine.patching import together, wrap_method

if TYPE_CHECKING:
    from asl_vllm.engine.scheduler.orders import SchedulerSide


@together()
def install() -> None:
    """Wraps the three methods; idempotent. Called where the engine core lives."""

    def wrap_finish(original: Any) -> Any:
        def finish_requests(
            self: Scheduler,
            request_ids: str | Iterable[str] | None,
            finished_status: RequestStatus,
        ) -> Any:
            if side := _side_of(self):
                if isinstance(request_ids, str):
                    request_ids = (request_ids,)
                elif request_ids is not None:
                    request_ids = set(request_ids)
                names = self.requests if request_ids is None else request_ids
                # What vLLM takes for loaded is freed, and forgotten, at once.
                self.finished_recving_kv_req_ids.update(filter(side.is_loading, names))
            ended = original(self, request_ids, finished_status)
            if side:
                ended = side.fills.for_clients(ended)
                side.fills.settle(self)
            return ended

        return finish_requests

    def wrap_reset(original: Any) -> Any:
        def reset_prefix_cache(
            self: Scheduler,
            reset_running_requests: bool = False,
            reset_connector: bool = False,
        ) -> Any:
            if reset_running_requests and (side := _side_of(self)):
                _put_back(self, side)
            return original(self, reset_running_requests, reset_connector)

        return reset_prefix_cache

    def wrap_pause(original: Any) -> Any:
        def set_pause_state(self: Scheduler, pause_state: PauseState) -> None:
            original(self, pause_state)
            if side := _side_of(self):
                side.paused = pause_state == PauseState.PAUSED_ALL

        return set_pause_state

    wrap_method(
        Scheduler,
        "finish_requests",
        ("self", "request_ids", "finished_status"),
        wrap_finish,
    )
    wrap_method(
        Scheduler,
        "reset_prefix_cache",
        ("self", "reset_running_requests", "reset_connector"),
        wrap_reset,
    )
    wrap_method(Scheduler, "set_pause_state", ("self", "pause_state"), wrap_pause)


def _side_of(scheduler: Scheduler) -> SchedulerSide | None:
    """Our half of the scheduler's connector; None of another engine's."""
    return getattr(scheduler.connector, "scheduler_side", None)


def _put_back(scheduler: Scheduler, side: SchedulerSide) -> None:
    """Has pruned prompts that do not run yet give up their blocks and wait again.

    As vLLM itself does with running requests when its cache is reset.
    """
    held = [r for r in scheduler.kv_holding_waiting if side.prunes(r.request_id)]
    # The last first, since each is put in front.
    for request in reversed(held):
        request_id = request.request_id
        scheduler.kv_holding_waiting.remove_request(request)
        scheduler.deferred_waiting.discard(request)
        scheduler.finished_recving_kv_req_ids.discard(request_id)
        scheduler._inflight_prefills.discard(request)
        scheduler._set_kv_fetch_stage(request, None)
        scheduler._free_request_blocks(request)
        request.num_computed_tokens = 0
        again = request.num_preemptions > 0
        request.status = RequestStatus.PREEMPTED if again else RequestStatus.WAITING
        scheduler.waiting.prepend_request(request)
        side.on_taken_back(request_id)
