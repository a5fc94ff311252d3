"""Prompts over cached prefixes together: each ends as alone, and as from scratch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from asl_vllm.prefill import PrefillJob, PrefillOutcome, RankLostError
from asl_vllm.selection.policies import POLICIES
from asl_vllm_testing.donated import over_prefixes
from asl_vllm_testing.packs import (
    LAYERS,
    MIXED,
    PLENTY,
    Again,
    drain,
    equal_to_alone,
    jobs,
    jobs_of_two_bands,
    made_factory,
    queue_of,
)
from asl_vllm_testing.toy import SHAPE, WINDOW, ToyDecoder
from asl_vllm_testing.two_ranks import Meeting, Rank

EIGHT = [("asl", 38, 20)] * 8
HIT = 30
WAYS: list[dict[str, Any]] = [
    {"tau": 0.7},
    {"tau": 0.0},
    {"selection_layer": 2, "propagated_share": 0.6},
    {"selection_layer": LAYERS - 1},
]


def _hits(seed: int) -> list[int]:
    """How much is cached of each of `MIXED`: of some nothing, of some all it may be."""
    random = torch.Generator().manual_seed(seed)
    most = [n - WINDOW for _, n, _ in MIXED]
    some = [int(torch.randint(n + 1, (), generator=random)) for n in most]
    return [0, most[1], *some[2:]]


def _equal_to_scratch(works: list[PrefillJob], model: ToyDecoder, **way: Any) -> None:
    scratch = [dataclasses.replace(work, reused_block_ids=()) for work in works]
    queue, other = queue_of(scratch, ToyDecoder(shape=model.shape), packed=1, **way)
    drain(queue)
    assert model.written.keys() == other.written.keys()
    for place, (key, value) in other.written.items():
        assert torch.equal(model.written[place][0], key), place
        assert torch.equal(model.written[place][1], value), place


def _over(
    kinds: list[tuple[str, int, int]], hits: list[int], model: ToyDecoder | None = None
) -> tuple[list[PrefillJob], ToyDecoder]:
    model = model or ToyDecoder()
    works, model.pool = over_prefixes(jobs(*kinds), hits)
    return works, model


@pytest.mark.parametrize(("step", "host"), [(1, True), (PLENTY, False)])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_mixed_prompts_end_as_alone(way: dict[str, Any], step: int, host: bool) -> None:
    works, model = _over(MIXED, _hits(step % 7))
    queue, _ = queue_of(works, model, host=host, **way)
    outcomes = drain(queue, step)
    equal_to_alone(works, model, outcomes, **way)
    _equal_to_scratch(works, model, **way)
    # A pass a layer for those that go through, and for those that start over.
    assert len(model.calls) == 2 * LAYERS


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_reads_together(policy: str) -> None:
    kinds = [(policy, n, pruned) for _, n, pruned in MIXED]
    works, model = _over(kinds, _hits(3))
    way = {"selection_layer": 2} if policy in ("fastkv", "gemfilter") else {}
    queue, _ = queue_of(works, model, **way)
    outcomes = drain(queue)
    equal_to_alone(works, model, outcomes, **way)
    _equal_to_scratch(works, model, **way)
    most = max(len(call.positions) for call in model.calls)
    assert most > max(n for _, n, _ in MIXED), "or they run apart"


@pytest.mark.parametrize("selection_layer", [0, 2, 3, 5])
def test_bands(selection_layer: int) -> None:
    shape = dataclasses.replace(SHAPE, num_layers=6)
    works, pool = over_prefixes(jobs_of_two_bands(), [36, 20, 0, 39], shape)
    model = ToyDecoder(shape=shape, pool=pool)
    queue, _ = queue_of(works, model, selection_layer=selection_layer)
    outcomes = drain(queue)
    equal_to_alone(works, model, outcomes, selection_layer=selection_layer)
    _equal_to_scratch(works, model, selection_layer=selection_layer)
    assert len(model.calls) == 6


def test_eight_hits_cost_the_passes_of_one() -> None:
    """Each layer is loaded and run once for all, and once more for what is selected."""
    way = {"selection_layer": 2}
    works, model = _over(EIGHT, [HIT] * 8)
    queue, _ = queue_of(works, model, **way)
    outcomes = drain(queue)
    equal_to_alone(works, model, outcomes, **way)
    assert model.loads == [8] * (3 + 3)
    assert len(model.reruns) == 3
    assert [len(call.positions) for call in model.calls] == [
        *[8 * (38 - HIT)] * 3,
        *[8 * 18] * (LAYERS - 3),
    ]
    apart, other = queue_of(works, ToyDecoder(pool=model.pool), packed=1, **way)
    drain(apart)
    assert Counter(other.loads) == {1: 8 * len(model.loads)}
    assert len(other.reruns) == 8 * len(model.reruns)
    assert len(other.calls) == 8 * len(model.calls)
    assert sum(model.reruns) == sum(other.reruns)


def test_a_step_spends_no_more_than_it_may() -> None:
    works, model = _over(EIGHT, [HIT] * 8)
    queue, _ = queue_of(works, model, selection_layer=2)

    def spent() -> int:
        return sum(len(call.positions) for call in model.calls) + sum(model.reruns)

    while len(queue):
        before = spent()
        queue.step(300)
        assert spent() - before <= 300


def test_who_reads_together() -> None:
    """Where few tokens pass at once, in the end too, and all rows have room."""
    packer = queue_of([], packed=32)[0]._packer
    assert packer is not None

    def count(kind: tuple[str, int, int], hit: int, number: int = 12) -> int:
        works = [
            dataclasses.replace(work, reused_block_ids=[list(range(hit))])
            for work in jobs(*[kind] * number)
        ]
        return packer.count(works, ())

    assert count(("snapkv", 60, 40), 50) == 5, "320 rows in all"
    assert count(("snapkv", 90, 60), 50) == 3
    assert count(("snapkv", 90, 60), 9) == 1, "81 pass at once"
    assert count(("asl", 30, 20), 26) == 10, "10 are kept of each"
    # Too many of the prefix's tokens would pass again.
    assert count(("asl", 160, 40), 150, 2) == 1
    assert count(("gemfilter", 160, 40), 150, 2) == 1
    assert count(("snapkv", 160, 40), 150, 2) == 2
    assert count(("fastkv", 160, 100), 150, 2) == 2
    assert count(("pyramidinfer", 160, 100), 150, 2) == 1
    assert count(("pyramidinfer", 60, 40), 50, 2) == 2, "short even from scratch"


@pytest.mark.parametrize("passes", range(LAYERS + 3))
def test_one_that_is_aborted_leaves_the_others_right(passes: int) -> None:
    """Between layers, and while selected tokens run again."""
    works, model = _over(EIGHT[:4], [HIT, 17, 34, 0])
    gone = works[passes % 4].request_id
    queue, _ = queue_of(works, model, selection_layer=2)
    for _ in range(passes):
        queue.step(1)
    assert queue.abort(gone)
    outcomes = drain(queue)
    left = [work for work in works if work.request_id != gone]
    (lost,) = (work for work in works if work.request_id == gone)
    for place in [p for p in model.written if p[1] in lost.block_ids[0]]:
        del model.written[place]
    equal_to_alone(left, model, outcomes, selection_layer=2)


class Failing(Again):
    """Fails once: in the load or the rerun of this number, counted from 1."""

    fails: tuple[str, int] | None = None

    def _fail(self, what: str, times: int) -> None:
        if self.fails == (what, times):
            self.fails = None
            raise torch.OutOfMemoryError("injected")

    def load_prefixes(self, *args: Any) -> None:
        super().load_prefixes(*args)
        self._fail("load", len(self.loads))

    def run_at(self, *args: Any) -> None:
        super().run_at(*args)
        self._fail("rerun", len(self.reruns))


@pytest.mark.parametrize("fails", [("load", 1), ("load", 3), ("load", 5), ("rerun", 2)])
def test_after_an_error_each_runs_alone(fails: tuple[str, int]) -> None:
    works, model = _over(EIGHT[:4], [HIT, 7, 33, 0], Failing())
    assert isinstance(model, Failing)
    model.fails = fails
    queue, _ = queue_of(works, model, selection_layer=2)
    outcomes = drain(queue)
    assert model.fails is None
    equal_to_alone(works, model, outcomes, selection_layer=2)


def _on_two_ranks(
    works: list[PrefillJob], pool: Any, fail_on: int | None = None, **options: Any
) -> list[tuple[Rank, list[PrefillOutcome] | BaseException]]:
    meeting = Meeting()

    def run(rank: int) -> tuple[Rank, list[PrefillOutcome] | BaseException]:
        class Own(Failing, Rank):
            pass

        model = Own(pool=pool).join(meeting, rank)
        if rank == fail_on:
            model.fails = "load", 2
        queue, _ = queue_of(works, model, **options)
        try:
            return model, drain(queue)
        except BaseException as error:
            meeting.leave()
            return model, error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, (0, 1)))


@pytest.mark.parametrize(("way", "packed"), [(WAYS[0], 8), (WAYS[2], 8), (WAYS[2], 1)])
def test_two_ranks_read_alike(way: dict[str, Any], packed: int) -> None:
    """Together or one by one: they keep the same, and meet as often as from scratch."""
    works, first = _over(MIXED, _hits(1))
    scratch = [dataclasses.replace(work, reused_block_ids=()) for work in works]
    ended = _on_two_ranks(works, first.pool, packed=packed, **way)
    other = _on_two_ranks(scratch, {}, packed=packed, **way)
    for (model, outcomes), (without, _) in zip(ended, other, strict=True):
        assert isinstance(outcomes, list)
        assert all(outcome.error is None for outcome in outcomes)
        assert (model.sums, model.exchanges) == (without.sums, without.exchanges)
        assert model.written.keys() == without.written.keys()
        for place, rows in without.written.items():
            assert all(map(torch.equal, model.written[place], rows)), place


def test_a_rank_that_cannot_load_ends() -> None:
    """The other one waits for it in the layer, and nobody would tell it."""
    works, first = _over(EIGHT[:2], [HIT, HIT])
    _, (_, lost) = _on_two_ranks(works, first.pool, fail_on=1)
    assert isinstance(lost, RankLostError)


def test_tokens_of_the_prefixes_here_are_selected() -> None:
    """Or being equal to alone says little."""
    works, model = _over(MIXED, _hits(1))
    queue, _ = queue_of(works, model, **WAYS[2])
    reports = [o.report for o in drain(queue) if o.report]
    assert sum(report.rerun_token_layers > 0 for report in reports) > 2
    assert sum(report.reused_tokens > 0 for report in reports) > 5


def test_what_passes_of_a_prompt_at_most() -> None:
    """A prompt without a prefix passes whole, whatever its policy."""
    factory = made_factory(ToyDecoder())
    (work,) = jobs(("snapkv", 40, 20))
    assert factory.most_passing(work) == 40
    cached = dataclasses.replace(work, reused_block_ids=[list(range(30))])
    assert factory.most_passing(cached) == 10
    unknown = dataclasses.replace(cached, policy="none")
    assert factory.most_passing(unknown) == 40
