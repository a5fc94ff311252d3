"""Short prompts together: each ends as alone."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from asl_vllm.prefill import (
    PrefillOutcome,
)
from asl_vllm.selection.policies import POLICIES, LayerDecision, SnapKvPolicy
from asl_vllm_testing.packs import (
    LAYERS,
    MIXED,
    PLENTY,
    Again,
    drain,
    equal_to_alone,
    jobs,
    jobs_of_two_bands,
    queue_of,
)
from asl_vllm_testing.toy import SHAPE, ToyDecoder
from asl_vllm_testing.two_ranks import Meeting, Rank


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("step", [1, 500, PLENTY])
@pytest.mark.parametrize(
    "way", [{"tau": 0.7}, {"tau": 0.0}, {"selection_layer": 2}], ids=str
)
def test_mixed_prompts_end_as_alone(way: dict[str, Any], step: int, host: bool) -> None:
    works = jobs(*MIXED)
    queue, model = queue_of(works, host=host, **way)
    equal_to_alone(works, model, drain(queue, step), **way)
    # A pass a layer, and as many for those that start over.
    assert len(model.calls) == 2 * LAYERS


@pytest.mark.parametrize("selection_layer", range(6))
def test_bands_that_keep_every_token_end_as_alone(selection_layer: int) -> None:
    shape = dataclasses.replace(SHAPE, num_layers=6)
    works = jobs_of_two_bands()
    queue, model = queue_of(
        works, ToyDecoder(shape=shape), selection_layer=selection_layer
    )
    outcomes = drain(queue)
    equal_to_alone(works, model, outcomes, selection_layer=selection_layer)
    assert len(model.calls) == 6


def test_progress_is_of_all_that_run() -> None:
    queue, _ = queue_of(jobs(*MIXED), selection_layer=1)
    queue.step(1)
    assert {p.layer for p in queue.progress().values()} == {1}
    assert list(queue.progress()) == [str(i) for i in range(len(MIXED))]


@pytest.mark.parametrize("passes", range(LAYERS))
@pytest.mark.parametrize("gone", ["0", "4", "7", "2"])
def test_one_that_is_aborted_leaves_the_others_right(gone: str, passes: int) -> None:
    works = jobs(*MIXED)
    queue, model = queue_of(works, tau=0.7)
    for _ in range(passes):
        queue.step(1)
    assert len(model.calls) == passes
    assert queue.abort(gone)
    assert gone not in queue.progress()
    outcomes = drain(queue)
    left = [work for work in works if work.request_id != gone]
    (lost,) = (work for work in works if work.request_id == gone)
    for place in [p for p in model.written if p[1] in lost.block_ids[0]]:
        del model.written[place]
    equal_to_alone(left, model, outcomes, tau=0.7)


def test_a_pack_without_prompts_is_gone() -> None:
    works = jobs(*MIXED)
    queue, _ = queue_of(works)
    queue.step(1)
    assert all(queue.abort(work.request_id) for work in works)
    assert not queue.abort("0")
    assert (len(queue), queue.progress(), queue.step(PLENTY)) == (0, {}, [])
    queue.add(works[0])
    assert [o.request_id for o in drain(queue)] == ["0"]


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_after_an_error_in_a_shared_pass_each_runs_alone(layer: int) -> None:
    works = jobs(*[("snapkv", n, 9) for n in (20, 30, 40)])
    model = Again()
    model.failing = (layer, 90)
    queue, _ = queue_of(works, model)
    outcomes = drain(queue)
    assert model.failing is None
    equal_to_alone(works, model, outcomes)
    sizes = [len(call.positions) for call in model.calls]
    assert sizes == [90] * layer + [20] * LAYERS + [30] * LAYERS + [40] * LAYERS


class Broken(SnapKvPolicy):
    """Raises at a layer."""

    def decide(self, layer: int, *args: Any) -> LayerDecision:
        if layer == 2:
            raise ZeroDivisionError("of this prompt")
        return super().decide(layer, *args)


class Ragged(SnapKvPolicy):
    """Scores that fit no layer."""

    def score(self, layer: int, *args: Any) -> Any:
        scores = super().score(layer, *args)
        assert scores is not None
        return scores[0][:, 1:], scores[1][1:]


class Unfinite(SnapKvPolicy):
    """Scores that are no numbers, which nobody looks at before the end."""

    def score(self, layer: int, *args: Any) -> Any:
        scores = super().score(layer, *args)
        assert scores is not None
        return scores[0] * float("nan"), scores[1]


@pytest.mark.parametrize(
    ("policy", "message"),
    [(Broken, "of this"), (Ragged, "layer score of Ragged"), (Unfinite, "not finite")],
)
def test_an_error_of_one_prompt_ends_no_other(
    policy: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "broken", policy)
    works = jobs(("asl", 40, 20), ("broken", 30, 20), ("gemfilter", 20, 9))
    queue, model = queue_of(works, Again())
    outcomes = drain(queue)
    (failed,) = (o for o in outcomes if o.error is not None)
    assert failed.request_id == "1"
    assert message in str(failed.error)
    slots = works[1].block_ids[0]
    for place in [p for p in model.written if p[1] in slots]:
        del model.written[place]
    others = [outcome for outcome in outcomes if outcome.error is None]
    equal_to_alone([works[0], works[2]], model, others)


def test_one_that_cannot_start_fails_alone() -> None:
    works = jobs(("asl", 40, 20), ("none", 30, 20), ("asl", 20, 9))
    queue, model = queue_of(works)
    outcomes = drain(queue)
    assert [o.request_id for o in outcomes if o.error] == ["1"]
    assert len(model.calls) == LAYERS
    equal_to_alone([works[0], works[2]], model, [o for o in outcomes if not o.error])


def test_two_ranks_meet_once_a_scored_layer() -> None:
    """One sum and one exchange for all prompts; an error of one is an error of both."""
    works = jobs(("asl", 40, 20), ("gemfilter", 30, 20), ("asl", 20, 9))

    def both(fail_on: int | None) -> list[tuple[Rank, list[PrefillOutcome]]]:
        meeting = Meeting()

        def run(rank: int) -> tuple[Rank, list[PrefillOutcome]]:
            class Own(Again, Rank):
                in_layer = failed = False

                def run_layer(self, *args: Any) -> None:
                    self.in_layer = True
                    super().run_layer(*args)
                    self.in_layer = False

                def attention_scale(self, layer: int) -> float:
                    # Before scores are summed.
                    asked = layer == 2 and not self.in_layer
                    if asked and rank == fail_on and not self.failed:
                        self.failed = True
                        raise torch.OutOfMemoryError("injected")
                    return super().attention_scale(layer)

            queue, model = queue_of(works, Own().join(meeting, rank), tau=0.0)
            assert isinstance(model, Rank)
            return model, drain(queue)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, (0, 1)))

    for model, outcomes in both(None):
        assert all(outcome.error is None for outcome in outcomes)
        # One for each prompt that starts, too.
        assert model.exchanges == len(works) + LAYERS
        assert model.sums == LAYERS
    for _, outcomes in both(1):
        assert [outcome.error for outcome in outcomes] == [None] * 3


def test_the_tests_prompts_select_and_start_over() -> None:
    """Or being equal to alone says little."""
    queue, _ = queue_of(jobs(*MIXED), tau=0.7)
    layers = [o.report.selection_layer for o in drain(queue) if o.report]
    assert len(set(layers)) > 2
