"""Two ranks, played by threads: whatever fails on one, both end the job alike."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_vllm.prefill import (
    OtherRankError,
    PrefillJob,
    PrefillQueue,
    RankLostError,
    hidden,
    prompt,
)
from asl_vllm.prefill.agreement import agreed
from asl_vllm.selection.policies import base, gemfilter
from asl_vllm_testing.toy import ToyDecoder, job, prefill
from asl_vllm_testing.two_ranks import Meeting, Rank


def ranks() -> list[Rank]:
    meeting = Meeting()
    return [Rank().join(meeting, rank) for rank in (0, 1)]


def note_thread(monkeypatch: pytest.MonkeyPatch, model: Rank) -> None:
    """``model.thread`` becomes the thread that it embeds in."""
    embed = model.embed

    def note(ids: Tensor, positions: Tensor) -> Tensor:
        model.thread = threading.get_ident()  # type: ignore[attr-defined]
        return embed(ids, positions)

    monkeypatch.setattr(model, "embed", note)


def run_both(
    models: list[Rank], work: PrefillJob | None = None
) -> list[BaseException | None]:
    """One prefill on both ranks at once; what each ended with."""

    def run(model: Rank) -> BaseException | None:
        try:
            begun, _, _ = prefill(work or job(), model=model, selection_layer=2)
            while not begun.done:
                begun.advance(50)
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, models))


def on_rank(models: list[Rank], rank: int, function: Any, nth: int) -> Any:
    """``function``, but its ``nth`` call by the thread of ``rank`` fails."""
    calls = [0]

    def maybe(*args: Any, **kwargs: Any) -> Any:
        mine = models[rank].thread == threading.get_ident()  # type: ignore[attr-defined]
        calls[0] += mine
        if mine and calls[0] == nth:
            raise torch.OutOfMemoryError("injected")
        return function(*args, **kwargs)

    return maybe


PLACES = ((base, "window_scores"), (prompt, "gather_kept"), (hidden, "gather_tokens"))


def _name(part: object) -> str:
    return part.__name__ if isinstance(part, ModuleType) else str(part)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("module", "place"), PLACES, ids=_name)
def test_an_error_of_one_rank_is_that_of_both(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, place: str, rank: int
) -> None:
    models = ranks()
    for model in models:
        note_thread(monkeypatch, model)
    nth = 1 if place == "gather_tokens" else 2
    failing = on_rank(models, rank, getattr(module, place), nth)
    monkeypatch.setattr(module, place, failing)
    ended = run_both(models)
    assert isinstance(ended[rank], torch.OutOfMemoryError)
    assert isinstance(ended[1 - rank], OtherRankError)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_write_is_that_of_both(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    models = ranks()

    def fail(*args: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(models[rank], "write_kept", fail)
    ended = run_both(models)
    assert str(ended[rank]) == "injected"
    assert isinstance(ended[1 - rank], OtherRankError)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_where_no_one_is_told_ends_the_rank(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Layers after the selection keep all their tokens, without an exchange."""
    models = ranks()
    calls = [0]

    def fail(layer: int, *args: Any) -> None:
        calls[0] += 1
        if layer == 3:
            models[1 - rank].meeting.leave()
            raise RuntimeError("injected")

    monkeypatch.setattr(models[rank], "write_kept", fail)
    ended = run_both(models)
    assert isinstance(ended[rank], RankLostError)
    assert isinstance(ended[1 - rank], threading.BrokenBarrierError)


def test_ranks_meet_twice_a_scored_layer_and_nowhere_else() -> None:
    models = ranks()
    assert run_both(models) == [None, None]
    # Layers 0 to 2 are scored: a sum, and an exchange.
    assert [(model.sums, model.exchanges) for model in models] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_where_no_scores_are_wanted_joins_the_others(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """gemfilter scores one layer, and a rank may fail at another."""
    models = ranks()
    asked: list[int] = []

    def score(self: Any, layer: int, *args: Any) -> None:
        if threading.get_ident() == models[rank].thread:  # type: ignore[attr-defined]
            asked.append(layer)
            raise torch.OutOfMemoryError("injected")

    for model in models:
        note_thread(monkeypatch, model)
    monkeypatch.setattr(gemfilter.GemFilterPolicy, "score", score)
    ended = run_both(models, job(policy="gemfilter"))
    assert asked == [0]
    assert isinstance(ended[rank], torch.OutOfMemoryError)
    assert isinstance(ended[1 - rank], OtherRankError)


def test_nothing_of_one_job_catches_a_lost_rank() -> None:
    """The queue ends a job at any `Exception`; this is for the whole process."""

    def start(_: Any) -> Any:
        raise RankLostError("a layer failed")

    queue = PrefillQueue(start)
    queue.add(job())
    with pytest.raises(RankLostError):
        queue.step(100)


def test_one_rank_alone_keeps_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError), agreed(ToyDecoder()):
        raise ZeroDivisionError
