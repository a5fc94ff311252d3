"""Two tensor-parallel ranks, played by threads."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from asl_vllm.prefill import Verdict
from asl_vllm_testing.toy import ToyDecoder

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

    def leave(self) -> None:
        self._barrier.abort()


class Rank(ToyDecoder):
    """A toy decoder that meets the other rank where vLLM's ranks do."""

    def join(self, meeting: Meeting, rank: int) -> Rank:
        self.meeting, self.rank = meeting, rank
        self.exchanges = self.sums = 0
        return self

    def run_layer(self, *args: Any) -> None:
        self.meeting.gather(self.rank, "layer")
        super().run_layer(*args)

    def sum_over_ranks(self, layer_score: Tensor) -> Tensor:
        self.sums += 1
        return torch.stack(self.meeting.gather(self.rank, layer_score)).sum(0)

    @property
    def num_ranks(self) -> int:
        return 2

    def exchange(self, failed: bool, digest: bytes) -> Verdict:
        self.exchanges += 1
        both = self.meeting.gather(self.rank, (failed, digest))
        if any(failed for failed, _ in both):
            return Verdict.FAILED
        return Verdict.SAME if len(set(both)) == 1 else Verdict.DIFFERENT
