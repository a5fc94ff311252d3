"""Two ranks, played by threads: whatever fails on one, both end the job alike."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_vllm.prefill import OtherRankError, PrefillQueue, RankLostError, hidden, passes
from asl_vllm.prefill.agreement import agreed
from asl_vllm.selection.policies import base
from asl_vllm_testing.toy import ToyDecoder, job, prefill

SECONDS = 20
"""A rank that waits alone fails the test instead of hanging it."""


class Meeting:
    """What a collective operation is to two ranks."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=SECONDS)
        self._given: dict[int, Any] = {}

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait()
        values = [self._given[0], self._given[1]]
        self._barrier.wait()
        return values


class Rank(ToyDecoder):
    """A toy decoder that meets the other rank where vLLM's ranks do."""

    def join(self, meeting: Meeting, rank: int) -> Rank:
        self.meeting, self.rank = meeting, rank
        return self

    def run_layer(self, *args: Any) -> None:
        self.meeting.gather(self.rank, "layer")
        super().run_layer(*args)

    def sum_over_ranks(self, layer_score: Tensor) -> Tensor:
        return torch.stack(self.meeting.gather(self.rank, layer_score)).sum(0)

    def ranks_agree(self, value: int) -> bool:
        return len(set(self.meeting.gather(self.rank, value))) == 1

    def any_rank_failed(self, failed: bool) -> bool:
        return any(self.meeting.gather(self.rank, failed))


def ranks() -> list[Rank]:
    meeting = Meeting()
    return [Rank().join(meeting, rank) for rank in (0, 1)]


def run_both(models: list[Rank]) -> list[BaseException | None]:
    """One prefill on both ranks at once; what each ended with."""

    def run(model: Rank) -> BaseException | None:
        try:
            begun, _, _ = prefill(job(), model=model, selection_layer=2)
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


PLACES = ((base, "window_scores"), (passes, "gather_kept"), (hidden, "gather_tokens"))


def _name(part: object) -> str:
    return part.__name__ if isinstance(part, ModuleType) else str(part)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("module", "place"), PLACES, ids=_name)
def test_an_error_of_one_rank_is_that_of_both(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, place: str, rank: int
) -> None:
    models = ranks()
    for model in models:
        embed = model.embed

        def note(ids: Tensor, model: Rank = model, embed: Any = embed) -> Tensor:
            model.thread = threading.get_ident()  # type: ignore[attr-defined]
            return embed(ids)

        monkeypatch.setattr(model, "embed", note)
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


def test_without_errors_both_end_well() -> None:
    assert run_both(ranks()) == [None, None]


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
