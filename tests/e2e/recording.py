"""A policy that notes every decision of the policy it stands in for."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from asl_vllm.selection.policies import POLICIES, LayerDecision


class Decisions:
    """Decisions of the prompts prefilled since the last `clear`, layer by layer."""

    def __init__(self) -> None:
        self.of_prompt: list[list[LayerDecision]] = []

    def clear(self) -> None:
        self.of_prompt.clear()


def record(monkeypatch: pytest.MonkeyPatch, name: str) -> Decisions:
    """Replaces policy ``name`` by one that records, for this test."""
    decisions = Decisions()
    base = POLICIES[name]

    class Recording(base):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._mine: list[LayerDecision] = []
            decisions.of_prompt.append(self._mine)

        def decide(
            self, layer: int, layer_score: Tensor, head_scores: Tensor
        ) -> LayerDecision:
            decision = super().decide(layer, layer_score, head_scores)
            self._mine.append(decision)
            return decision

    monkeypatch.setitem(POLICIES, name, Recording)
    return decisions
