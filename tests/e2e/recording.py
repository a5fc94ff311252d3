"""Notes of what happens inside an engine: decisions of a policy, work of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from asl_vllm.selection.policies import POLICIES, LayerDecision
from asl_vllm_testing.harness import Engine


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
            self,
            layer: int,
            layer_score: Tensor,
            head_scores: Tensor,
            observed: float | None,
        ) -> LayerDecision:
            decision = super().decide(layer, layer_score, head_scores, observed)
            self._mine.append(decision)
            return decision

    monkeypatch.setitem(POLICIES, name, Recording)
    return decisions


@dataclass
class StepWork:
    """What one engine step computed."""

    scheduled_tokens: int
    """Tokens that vLLM scheduled; each goes through all layers."""
    passes: list[int]
    """Tokens of each prefill pass; a pass is one layer."""


def record_steps(monkeypatch: pytest.MonkeyPatch, host: Engine) -> list[StepWork]:
    """A list that grows by a `StepWork` for each engine step from now on."""
    steps: list[StepWork] = []
    schedule = host.scheduler.schedule
    run_layer = host.factory.model.run_layer

    def scheduling(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        steps.append(StepWork(output.total_num_scheduled_tokens, []))
        return output

    def running(layer: int, positions: Tensor, *args: Any) -> None:
        steps[-1].passes.append(len(positions))
        run_layer(layer, positions, *args)

    monkeypatch.setattr(host.scheduler, "schedule", scheduling)
    monkeypatch.setattr(host.factory.model, "run_layer", running)
    return steps
