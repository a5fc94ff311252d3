"""What ranks do together: one that fails in it leaves the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asl_vllm.engine.worker import ranks as ranks_module
from asl_vllm.engine.worker.decoder import VllmDecoder
from asl_vllm.prefill import RankLostError, Verdict

EMPTY = torch.empty(0, dtype=torch.int64)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("injected")


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> VllmDecoder:
    """One whose layers and collective operations fail."""
    made: Any = VllmDecoder.__new__(VllmDecoder)
    made.shape = SimpleNamespace(device=torch.device("cpu"))
    made._embed = made._run_layer = fail
    made._attentions = [SimpleNamespace(kv_cache=EMPTY)]
    made._pool_rows = SimpleNamespace(rows_of=fail)
    made._scratch = SimpleNamespace(pages=EMPTY)
    monkeypatch.setattr(ranks_module, "tensor_model_parallel_all_reduce", fail)
    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    decoder: VllmDecoder = made
    return decoder


def with_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    group = SimpleNamespace(world_size=world_size, cpu_group="group")
    monkeypatch.setattr(ranks_module, "get_tp_group", lambda: group)


NOTHING: Any = None
TOGETHER: dict[str, Callable[[VllmDecoder], object]] = {
    "embed": lambda decoder: decoder.embed(NOTHING, NOTHING),
    "run_layer": lambda decoder: decoder.run_layer(0, NOTHING, NOTHING, 0, NOTHING),
    "load_prefixes": lambda decoder: decoder.load_prefixes(0, EMPTY, []),
    "sum_over_ranks": lambda decoder: decoder.sum_over_ranks(NOTHING),
    "greatest": lambda decoder: decoder.greatest(0.0),
    "exchange": lambda decoder: decoder.exchange(False, b""),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_an_error_among_ranks_ends_this_one(
    monkeypatch: pytest.MonkeyPatch, decoder: VllmDecoder, what: str
) -> None:
    with_ranks(monkeypatch, 2)
    with pytest.raises(RankLostError, match=r"failed on one rank: .*injected"):
        TOGETHER[what](decoder)


@pytest.mark.parametrize("what", ["embed", "run_layer", "sum_over_ranks"])
def test_one_rank_alone_keeps_its_error(
    monkeypatch: pytest.MonkeyPatch, decoder: VllmDecoder, what: str
) -> None:
    with_ranks(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        TOGETHER[what](decoder)


def test_one_rank_alone_agrees_without_asking(
    monkeypatch: pytest.MonkeyPatch, decoder: VllmDecoder
) -> None:
    with_ranks(monkeypatch, 1)
    assert decoder.num_ranks == 1
    assert decoder.greatest(0.5) == 0.5
    assert decoder.exchange(False, b"") is Verdict.SAME
    assert decoder.exchange(True, b"") is Verdict.FAILED
