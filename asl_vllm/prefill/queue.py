"""First-come-first-served queue of pruned prefills in a worker."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from asl_vllm.prefill.job import PrefillJob, PrefillProgress, PrefillReport
from asl_vllm.prefill.pack import Pack
from asl_vllm.prefill.packer import Packer
from asl_vllm.prefill.passes import Prefill

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefillOutcome:
    """A job that ended in this step: with a report, or with an error."""

    request_id: str
    report: PrefillReport | None
    error: str | None = None


class PrefillQueue:
    """Runs jobs in order of arrival, a bounded amount a step.

    One at a time, but for short ones that come one after another: they run together
    where ``packer`` says so. ``start`` makes a `Prefill` of a job when its turn comes;
    the buffers behind it belong to what runs alone. Several short jobs may end in one
    step.
    """

    def __init__(
        self, start: Callable[[PrefillJob], Prefill], packer: Packer | None = None
    ) -> None:
        self._start = start
        self._packer = packer
        self._waiting: deque[PrefillJob] = deque()
        self._alone: set[str] = set()
        self._running: Prefill | Pack | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._prefills())

    def _prefills(self) -> list[Prefill]:
        """Those that run."""
        running = self._running
        if running is None:
            return []
        return running.prefills if isinstance(running, Pack) else [running]

    def progress(self) -> dict[str, PrefillProgress]:
        """How far the running jobs are, by request id; empty when none runs."""
        return {p.job.request_id: p.progress for p in self._prefills()}

    def add(self, job: PrefillJob) -> None:
        """Queues a job."""
        self._waiting.append(job)

    def abort(self, request_id: str) -> bool:
        """Drops a job, running or not; whether it was there."""
        self._alone.discard(request_id)
        for prefill in self._prefills():
            if prefill.job.request_id == request_id:
                if isinstance(self._running, Pack):
                    self._running.drop(request_id)
                if not isinstance(self._running, Pack) or self._running.done:
                    self._running = None
                return True
        kept = deque(job for job in self._waiting if job.request_id != request_id)
        found = len(kept) < len(self._waiting)
        self._waiting = kept
        return found

    def step(self, token_layers: int) -> list[PrefillOutcome]:
        """Runs passes that fit ``token_layers`` and returns the jobs that ended.

        The step's first pass runs whether it fits or not, so that steps full of
        other work cannot starve a job: it ends after at most as many steps as it
        has passes. An error ends its own job and no other.
        """
        outcomes: list[PrefillOutcome] = []
        spent = 0
        while len(self):
            if self._running is None:
                self._begin(outcomes)
            running = self._running
            if running is None:
                continue
            left = token_layers - spent
            if spent and running.next_cost > left:
                break
            before = running.computed_token_layers
            try:
                running.advance(left)
                error = None
            except Exception as raised:  # a job's error must not reach the others
                error = raised
            spent += running.computed_token_layers - before
            outcomes += self._ended(running, error)
            if error is None and not running.done:
                break
            self._running = None
        return outcomes

    def _begin(self, outcomes: list[PrefillOutcome]) -> None:
        """Starts the next job, or the next few together; one may fail at once."""
        count = 1
        if self._packer is not None:
            count = self._packer.count(self._waiting, self._alone)
        prefills = []
        for _ in range(count):
            job = self._waiting.popleft()
            self._alone.discard(job.request_id)
            try:
                prefills.append(self._start(job))
            except Exception as error:
                outcomes.append(_error_of(job, error))
        if len(prefills) > 1:
            assert self._packer is not None
            self._running = self._packer.pack(prefills)
        elif prefills:
            (self._running,) = prefills

    def _ended(
        self, running: Prefill | Pack, error: Exception | None
    ) -> list[PrefillOutcome]:
        """Reports of those that ended, and the error of one that ran alone.

        Of those that ran together nobody knows whose error it is: they wait again.
        """
        if isinstance(running, Pack):
            ended = running.take_ended()
            if error is not None:
                self._run_alone([prefill.job for prefill in running.prefills], error)
        elif error is not None:
            return [_error_of(running.job, error)]
        else:
            ended = [running] if running.done else []
        return [PrefillOutcome(p.job.request_id, p.report()) for p in ended]

    def _run_alone(self, jobs: list[PrefillJob], error: Exception) -> None:
        logger.warning(
            "one of %d pruned prefills in a pass failed; each runs again, alone",
            len(jobs),
            exc_info=error,
        )
        self._alone.update(job.request_id for job in jobs)
        self._waiting.extendleft(reversed(jobs))


def _error_of(job: PrefillJob, error: Exception) -> PrefillOutcome:
    logger.error("pruned prefill of %s failed", job.request_id, exc_info=error)
    return PrefillOutcome(job.request_id, None, repr(error))
