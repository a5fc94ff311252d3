"""`PrefillQueue`: order, bounds of a step, aborts and failures."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from asl_vllm.prefill import (
    LayerTap,
    PrefillJob,
    PrefillOutcome,
    PrefillProgress,
    PrefillQueue,
)
from asl_vllm_testing.toy import SHAPE, ToyDecoder, factory, job, run

LAYERS = SHAPE.num_layers
CHUNK = 16
PLENTY = 10**9


class FailingDecoder(ToyDecoder):
    """Raises in ``run_layer`` at (layer, start) as often as it is listed."""

    def __init__(self, *failures: tuple[int, int]) -> None:
        super().__init__()
        self.failures = list(failures)

    def run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        tap: LayerTap,
    ) -> None:
        if (layer, start) in self.failures:
            self.failures.remove((layer, start))
            raise RuntimeError("out of memory")
        super().run_layer(layer, positions, hidden, start, tap)


def own_slots(work: PrefillJob, index: int) -> PrefillJob:
    """The job with slots that no other job has."""
    slots = [slot + 10_000 * index for slot in work.block_ids[0]]
    return dataclasses.replace(work, block_ids=[slots])


def queue_of(
    *jobs: PrefillJob, model: ToyDecoder | None = None, **options: object
) -> tuple[PrefillQueue, ToyDecoder]:
    model = model or ToyDecoder()
    queue = PrefillQueue(factory(model, chunk=CHUNK, tau=0.0, **options))
    for index, work in enumerate(jobs):
        queue.add(own_slots(work, index))
    return queue, model


def names(outcomes: list[PrefillOutcome]) -> list[str]:
    return [outcome.request_id for outcome in outcomes]


def drain(queue: PrefillQueue, token_layers: int) -> list[PrefillOutcome]:
    outcomes = []
    for _ in range(1000):
        if not len(queue):
            return outcomes
        outcomes += queue.step(token_layers)
    raise AssertionError("the queue does not come to an end")


def cost(work: PrefillJob) -> int:
    return work.num_prompt_tokens * LAYERS


def spent(model: ToyDecoder) -> int:
    return sum(len(call.positions) for call in model.calls)


def test_an_empty_queue_does_nothing() -> None:
    queue, model = queue_of()
    assert len(queue) == 0
    assert queue.step(PLENTY) == []
    assert queue.step(0) == []
    assert not model.calls


@pytest.mark.parametrize("token_layers", [0, 50, 200, PLENTY])
def test_first_come_first_served(token_layers: int) -> None:
    jobs = [job("a", 60), job("b", 45), job("c", 70), job("d", 45)]
    queue, _ = queue_of(*jobs)
    outcomes = drain(queue, token_layers)
    assert names(outcomes) == ["a", "b", "c", "d"]
    for outcome, work in zip(outcomes, jobs, strict=True):
        assert outcome.error is None
        assert outcome.report is not None
        assert outcome.report.computed_token_layers == cost(work)


def test_progress_is_of_the_running_job() -> None:
    queue, model = queue_of(job("a", 60), job("b", 45))
    assert queue.progress() == {}
    seen = []
    while len(queue) == 2:
        queue.step(0)
        seen.append(queue.progress())
    assert queue.progress() == {"b": PrefillProgress(0, None)}, "b is next"
    layers = [progress["a"].layer for progress in seen[:-1]]
    assert layers == sorted(layers)
    assert set(layers) == set(range(LAYERS))
    queue.step(0)
    assert list(queue.progress()) == ["b"]
    assert model.calls


def test_progress_shows_the_selection_layer_once_it_is_found() -> None:
    queue, _ = queue_of(job("a", 60), selection_layer=2)
    seen = {}
    while len(queue):
        queue.step(0)
        for progress in queue.progress().values():
            seen[progress.layer] = progress.selection_layer
    assert seen == {0: None, 1: None, 2: None, 3: 2, 4: 2}


def test_a_shorter_job_does_not_overtake() -> None:
    queue, _ = queue_of(job("long", 90), job("short", 45))
    assert queue.step(cost(job(n=45))) == []
    assert len(queue) == 2


def test_several_short_jobs_end_in_one_step() -> None:
    jobs = [job(name, 45) for name in "abcd"]
    queue, _ = queue_of(*jobs)
    budget = 3 * cost(jobs[0])
    assert names(queue.step(budget)) == ["a", "b", "c"]
    assert len(queue) == 1
    assert names(queue.step(budget)) == ["d"]


def test_a_job_starts_in_what_another_left_of_a_step() -> None:
    queue, model = queue_of(job("a", 45), job("b", 60))
    assert names(queue.step(cost(job(n=45)) + CHUNK)) == ["a"]
    assert spent(model) == cost(job(n=45)) + CHUNK
    assert len(queue) == 1


def test_a_job_does_not_start_in_less_than_its_pass_takes() -> None:
    queue, model = queue_of(job("a", 45), job("b", 60))
    assert names(queue.step(cost(job(n=45)) + CHUNK - 1)) == ["a"]
    assert spent(model) == cost(job(n=45))
    assert len(queue) == 1
    assert names(drain(queue, PLENTY)) == ["b"]


@pytest.mark.parametrize("token_layers", [0, -7])
def test_a_step_without_room_advances_one_pass(token_layers: int) -> None:
    queue, model = queue_of(job("a", 60), job("b", 60))
    assert queue.step(token_layers) == []
    assert len(model.calls) == 1
    assert queue.step(token_layers) == []
    assert len(model.calls) == 2


def test_a_step_without_room_ends_at_most_one_job() -> None:
    queue, model = queue_of(job("a", 45), job("b", 45))
    outcomes: list[PrefillOutcome] = []
    steps = 0
    while not outcomes:
        outcomes = queue.step(0)
        steps += 1
    assert names(outcomes) == ["a"]
    assert len(model.calls) == steps, "the next job ran in the same step"


@pytest.mark.parametrize("token_layers", [1, 16, 17, 300])
def test_a_step_spends_no_more_than_it_may(token_layers: int) -> None:
    """Only its first pass may, and that is a chunk."""
    queue, model = queue_of(*(job(name, 45) for name in "abcde"))
    while len(queue):
        before = spent(model)
        queue.step(token_layers)
        assert spent(model) - before <= max(token_layers, CHUNK)


def passes(work: PrefillJob) -> int:
    return -(-work.num_prompt_tokens // CHUNK) * LAYERS


def test_a_long_job_ends_although_short_ones_keep_coming() -> None:
    """And although no step has room for it."""
    queue, _ = queue_of(job("long", 90))
    for turn in range(passes(job(n=90))):
        queue.add(own_slots(job(f"short{turn}", 45), 1 + turn))
        ended = names(queue.step(0))
    assert ended == ["long"]


def test_a_step_with_prefills_takes_no_longer_than_a_step_of_stock_prefill() -> None:
    """The clock runs one tick a token-layer; a neighbour decodes in each step."""
    step_tokens, decoding = 4 * CHUNK, 3
    queue, model = queue_of(*(job(name, 90) for name in "abc"))
    longest = 0
    while len(queue):
        before = spent(model)
        queue.step((step_tokens - decoding) * LAYERS)
        longest = max(longest, decoding * LAYERS + spent(model) - before)
    assert longest <= step_tokens * LAYERS
    assert longest > (step_tokens - CHUNK) * LAYERS, "or the bound says nothing"


def test_interleaving_does_not_change_results() -> None:
    queue, model = queue_of(job("a", 60), job("b", 70))
    drain(queue, 0)
    for index, work in enumerate((job("a", 60), job("b", 70))):
        alone = run(work, tau=0.0).model.written
        for (layer, slot), (key, value) in alone.items():
            mine = model.written[layer, slot + 10_000 * index]
            assert torch.equal(mine[0], key)
            assert torch.equal(mine[1], value)


def test_abort_of_a_waiting_job() -> None:
    queue, _ = queue_of(job("a"), job("b"), job("c"))
    assert queue.abort("b")
    assert len(queue) == 2
    assert names(drain(queue, PLENTY)) == ["a", "c"]


def test_abort_of_the_running_job() -> None:
    queue, model = queue_of(job("a"), job("b"))
    queue.step(CHUNK)
    assert queue.abort("a")
    assert len(queue) == 1
    assert names(drain(queue, PLENTY)) == ["b"]
    assert not {slot for _, slot in model.written} & set(job("a").block_ids[0])


def test_abort_before_any_step() -> None:
    queue, model = queue_of(job("a"))
    assert queue.abort("a")
    assert len(queue) == 0
    assert queue.step(PLENTY) == []
    assert not model.calls


def test_abort_of_an_unknown_or_ended_job() -> None:
    queue, _ = queue_of(job("a"))
    assert not queue.abort("b")
    drain(queue, PLENTY)
    assert not queue.abort("a")


def test_an_aborted_name_can_come_again() -> None:
    """A preempted request keeps its id and gets new slots."""
    queue, _ = queue_of(job("a"))
    queue.step(CHUNK)
    queue.abort("a")
    queue.add(own_slots(job("a"), 1))
    assert names(drain(queue, PLENTY)) == ["a"]


@pytest.mark.parametrize("failure", [(0, 0), (0, 16), (3, 0), (LAYERS - 1, 32)])
def test_an_error_fails_its_own_job_only(
    failure: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    queue, _ = queue_of(job("a"), job("b"), model=FailingDecoder(failure))
    with caplog.at_level(logging.ERROR):
        first, second = drain(queue, PLENTY)
    assert (first.request_id, first.report) == ("a", None)
    assert first.error is not None
    assert "out of memory" in first.error
    assert second.request_id == "b"
    assert second.report is not None
    assert "a failed" in caplog.text


def test_a_job_after_a_failed_one_is_untouched_by_it() -> None:
    model = FailingDecoder((3, 16))
    queue, _ = queue_of(job("a", 90), job("b", 60), model=model)
    drain(queue, 0)
    alone = run(job("b", 60), tau=0.0).model.written
    for (layer, slot), (key, _) in alone.items():
        assert torch.equal(model.written[layer, slot + 10_000][0], key)


def test_a_failing_step_ends() -> None:
    """Also when every job fails and there is nothing to spend."""
    queue, _ = queue_of(job("a"), job("b"), model=FailingDecoder(*[(0, 0)] * 2))
    assert names(queue.step(0)) == ["a"]
    assert names(queue.step(0)) == ["b"]
    assert len(queue) == 0


def test_a_job_that_cannot_start_fails_alone() -> None:
    queue, _ = queue_of(job("long", 100), job("short", 45), capacity=64)
    long, short = drain(queue, PLENTY)
    assert long.report is None
    assert long.error is not None
    assert "max_prefill_tokens" in long.error
    assert short.report is not None


def test_an_unknown_policy_fails_its_job() -> None:
    queue, _ = queue_of(job("a", policy="none"), job("b"))
    first, second = drain(queue, PLENTY)
    assert first.error is not None
    assert "kv policy" in first.error
    assert second.error is None


def test_scores_that_are_not_finite_fail_the_job() -> None:
    queue, _ = queue_of(job("a"), job("b"), model=ToyDecoder(poison={2}))
    first, second = drain(queue, PLENTY)
    assert first.error is not None
    assert "layer 2" in first.error
    assert second.report is not None


def test_a_failed_job_uses_up_its_part_of_the_step() -> None:
    model = FailingDecoder((LAYERS - 1, 32))
    queue, _ = queue_of(job("a"), job("b"), model=model)
    budget = cost(job())
    queue.step(budget)
    assert spent(model) < budget + CHUNK
