"""`WorkerSide`: what a step's orders do to the queue, and what it reports."""

from __future__ import annotations

import warnings

import pytest
from vllm.utils import gpu_sync_debug

from asl_vllm.engine.messages import StepOrders
from asl_vllm.engine.worker.runner import WorkerSide
from asl_vllm.prefill import PrefillJob, PrefillOutcome, PrefillReport


class Queue:
    """A `PrefillQueue` of which each job ends in its first step."""

    def __init__(self) -> None:
        self.jobs: list[PrefillJob] = []

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, job: PrefillJob) -> None:
        self.jobs.append(job)

    def abort(self, request_id: str) -> bool:
        before = len(self.jobs)
        self.jobs = [job for job in self.jobs if job.request_id != request_id]
        return len(self.jobs) < before

    def step(self, token_layers: int) -> list[PrefillOutcome]:
        ended, self.jobs = self.jobs, []
        return [
            PrefillOutcome(
                job.request_id,
                PrefillReport(1, job.num_prompt_tokens, 1, 0.0),
            )
            for job in ended
        ]

    def progress(self) -> dict[str, object]:
        return {}


def job(name: str, tokens: int = 8) -> PrefillJob:
    return PrefillJob(
        request_id=name,
        policy="asl",
        prompt_token_ids=[1] * tokens,
        pruned_blocks=4,
        block_size=1,
        block_ids=[[0]],
    )


@pytest.fixture
def side() -> WorkerSide:
    side = WorkerSide()
    side.queue = Queue()  # type: ignore[assignment]
    return side


def reported(side: WorkerSide) -> tuple[set[str], dict[str, int]]:
    """Names that have ended, and prompt lengths in the reports."""
    done = side.take_results().finished_recving
    reports = side.take_reports()
    return done, {
        name: report.computed_token_layers
        for name, report in (reports.reports if reports else {}).items()
    }


def test_a_dropped_job_runs_no_pass_and_is_reported_as_done(side: WorkerSide) -> None:
    side.run(StepOrders([job("a"), job("b")], paused=True))
    assert reported(side) == (set(), {})
    side.run(StepOrders(drops={"a"}))
    assert reported(side) == ({"a", "b"}, {"b": 8})


def test_a_drop_is_of_the_job_before_not_of_one_that_comes_with_it(
    side: WorkerSide,
) -> None:
    side.run(StepOrders([job("b")], paused=True))
    side.run(StepOrders([job("a", 9)], drops={"a"}))
    assert reported(side) == ({"a", "b"}, {"a": 9, "b": 8})


def test_a_drop_of_a_job_that_has_ended_is_no_second_report(side: WorkerSide) -> None:
    side.run(StepOrders([job("a")]))
    assert reported(side) == ({"a"}, {"a": 8})
    side.run(StepOrders(drops={"a"}))
    assert reported(side) == (set(), {})


def test_a_paused_step_runs_no_pass(side: WorkerSide) -> None:
    side.run(StepOrders([job("a")], token_layers=100, paused=True))
    assert reported(side) == (set(), {})
    side.run(StepOrders())
    assert reported(side) == ({"a"}, {"a": 8})


@pytest.mark.parametrize("inside", [False, True])
def test_passes_may_wait_for_the_device(
    side: WorkerSide, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """With ``VLLM_GPU_SYNC_CHECK=error`` a step that does fails, and its requests."""

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    class Waiting(Queue):
        def step(self, token_layers: int) -> list[PrefillOutcome]:
            wait()
            return super().step(token_layers)

    monkeypatch.setattr(gpu_sync_debug, "_SYNC_CHECK_MODE", "error")
    monkeypatch.setattr(gpu_sync_debug, "_sync_check_enabled", True)
    side.queue = Waiting()  # type: ignore[assignment]
    with warnings.catch_warnings():
        # What vLLM's check of a step does, but for what needs a GPU.
        gpu_sync_debug._install_warning_hook()
        token = gpu_sync_debug._checking.set("error")
        try:
            if inside:
                side.run(StepOrders([job("a")], 8, set(), False))
                assert side.take_results().finished_recving == {"a"}
            else:
                with pytest.raises(RuntimeError, match="sync detected"):
                    wait()
        finally:
            gpu_sync_debug._checking.reset(token)
