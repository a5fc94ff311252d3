"""What `decide` refuses, whatever policy it asks."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.selection import Keep, LayerDecision, Policy, SelectionError, decide

KV_HEADS, TOKENS, KEPT, WINDOW = 2, 60, 20, 8
KEEPS = torch.arange(KEPT).expand(KV_HEADS, -1)
TAKES = torch.arange(KEPT)
SCORED = TOKENS - WINDOW


class Careless(Policy):
    """Decides one thing, without a look at its scores."""

    decision = LayerDecision(KEEPS, TAKES)
    asked = 0

    def decide(self, *_: object) -> LayerDecision:
        self.asked += 1
        return self.decision


def careless(decision: LayerDecision = Careless.decision) -> Careless:
    policy = Careless(AslConfig(window=WINDOW), num_layers=4, kept_tokens=KEPT)
    policy.decision = decision
    return policy


def ask(policy: Policy, scored: int = SCORED) -> LayerDecision:
    head_scores = torch.rand(KV_HEADS, scored)
    return decide(policy, 3, TOKENS, head_scores.sum(0), head_scores)


def test_a_policy_need_not_look_whether_scores_are_finite() -> None:
    policy = careless()
    for bad in (float("nan"), float("inf"), float("-inf")):
        scores = torch.rand(KV_HEADS, SCORED)
        broken = scores.clone()
        broken[1, 17] = bad
        for layer_score, head_scores in (
            (scores.sum(0), broken),
            (broken[1], scores),
        ):
            with pytest.raises(SelectionError, match=r"layer 3: .* not finite"):
                decide(policy, 3, TOKENS, layer_score, head_scores)
    assert policy.asked == 0


def test_what_was_observed_is_handed_on_as_a_number() -> None:
    class Observing(Careless):
        seen: object = None

        def observe(self, layer: int, layer_score: Tensor) -> Tensor:
            return layer_score.double().sum()

        def decide(self, *given: object) -> LayerDecision:
            self.seen = given[-1]
            return self.decision

    policy = Observing(AslConfig(window=WINDOW), num_layers=4, kept_tokens=KEPT)
    decide(policy, 0, TOKENS, torch.ones(SCORED), torch.ones(KV_HEADS, SCORED))
    assert policy.seen == float(SCORED)


@pytest.mark.parametrize(
    "decision",
    [
        LayerDecision(KEEPS),
        LayerDecision(KEEPS, TAKES),
        LayerDecision(KEEPS, torch.arange(TOKENS)),
        LayerDecision(Keep.NONE),
        LayerDecision(Keep.NONE, TAKES, restart=True),
    ],
    ids=lambda d: f"{type(d.kept).__name__}-{type(d.deeper).__name__}-{d.restart}",
)
def test_decisions_that_fit(decision: LayerDecision) -> None:
    assert ask(careless(decision)) is decision


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        (LayerDecision(Keep.ALL), "kept of Careless: got Keep.ALL; allowed: int64 "),
        (LayerDecision(KEEPS[:, 1:]), "kept of Careless: got torch.int64 [2, 19]; "),
        (LayerDecision(KEEPS[0]), "got torch.int64 [20]; allowed: int64 [2, 20]"),
        (LayerDecision(KEEPS.int()), "got torch.int32 [2, 20]; allowed: int64"),
        (LayerDecision(KEEPS, TAKES[1:]), "deeper of Careless: got torch.int64 [19]; "),
        (LayerDecision(KEEPS, torch.arange(61)), "allowed: int64 [20 to 60], or Keep"),
        (LayerDecision(KEEPS, KEEPS), "deeper of Careless: got torch.int64 [2, 20]"),
        (LayerDecision(KEEPS, TAKES > 3), "deeper of Careless: got torch.bool [20]"),
        (LayerDecision(KEEPS, None), "deeper of Careless: got None; allowed"),  # type: ignore[arg-type]
        (LayerDecision(None), "kept of Careless: got None; allowed"),  # type: ignore[arg-type]
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_decisions_that_do_not_fit_their_layer(
    decision: LayerDecision, said: str
) -> None:
    with pytest.raises(SelectionError, match=re.escape(said)) as refused:
        ask(careless(decision))
    assert str(refused.value).startswith("layer 3: the ")


@pytest.mark.parametrize("scored", [SCORED - 1, SCORED + 1, TOKENS])
def test_scores_that_do_not_fit_their_layer(scored: int) -> None:
    said = rf"layer score of Careless: got .* \[{scored}\]; allowed: float32 \[52\]"
    with pytest.raises(SelectionError, match=said):
        ask(careless(), scored)


def test_no_decision_without_a_meaning() -> None:
    with pytest.raises(ValueError, match=r"deeper: got Keep.NONE"):
        LayerDecision(KEEPS, Keep.NONE)
    for kept, deeper in ((KEEPS, TAKES), (Keep.NONE, Keep.ALL)):
        with pytest.raises(ValueError, match="restart: got"):
            LayerDecision(kept, deeper, restart=True)
