"""Policies: when they select, what they keep, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_vllm.config import POLICY_NAMES, AslConfig, ConfigError
from asl_vllm.selection import (
    POLICIES,
    LayerDecision,
    SelectionError,
    kept_per_head,
    make_policy,
    propagated_tokens,
)

LAYERS, KV_HEADS, WINDOW, PREFIX, KEPT = 16, 2, 8, 120, 40


def settling_scores(settle: float, layers: int = LAYERS, seed: int = 0) -> list[Tensor]:
    """Head scores per layer whose noise shrinks by the factor ``settle`` a layer."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(KV_HEADS, PREFIX, generator=generator)
    return [
        base + settle**layer * torch.rand(KV_HEADS, PREFIX, generator=generator)
        for layer in range(layers)
    ]


def decide_all(name: str, scores: list[Tensor], **options: Any) -> list[LayerDecision]:
    config = AslConfig(policy=name, window=WINDOW, **options)
    policy = make_policy(name, config, num_layers=LAYERS, kept_tokens=KEPT)
    decisions = []
    for layer, head_scores in enumerate(scores):
        decisions.append(policy.decide(layer, head_scores.sum(0), head_scores))
        if decisions[-1].propagated is not None:
            break
    return decisions


def naive_ratios(scores: list[Tensor], l_min: int, l_obs: int) -> list[float]:
    ranks = []
    for head_scores in scores:
        best_first = head_scores.sum(0).argsort(descending=True).tolist()
        ranks.append([best_first.index(token) + 1 for token in range(PREFIX)])
    variances = []
    for layer in range(l_min, len(scores)):
        seen = ranks[max(0, layer - l_obs + 1) : layer + 1]
        top = KEPT - WINDOW
        union = [t for t in range(PREFIX) if any(row[t] <= top for row in seen)]
        squares = []
        for token in union:
            mean = sum(row[token] for row in seen) / len(seen)
            squares += [(row[token] - mean) ** 2 for row in seen]
        variances.append(sum(squares) / len(squares))
    return [variance / variances[0] for variance in variances]


@pytest.mark.parametrize(
    ("l_min", "l_obs"),
    [(5, 4), (1, 8), (4, 2), (10, 3), (15, 8)],  # (1, 8): fewer layers seen than l_obs
)
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 1.0, 1.5])
def test_asl_selects_at_the_first_settled_layer(
    l_min: int, l_obs: int, tau: float
) -> None:
    scores = settling_scores(0.8)
    want = naive_ratios(scores, l_min, l_obs)
    settled = [l_min + i for i, ratio in enumerate(want) if ratio < tau]
    decisions = decide_all("asl", scores, l_min=l_min, l_obs=l_obs, tau=tau)
    assert len(decisions) == (settled[0] + 1 if settled else LAYERS)
    assert (decisions[-1].propagated is not None) == bool(settled)
    assert all(decision.ratio is None for decision in decisions[:l_min])
    ratios = [decision.ratio for decision in decisions[l_min:]]
    assert ratios == pytest.approx(want[: len(ratios)], rel=1e-9)


def test_asl_resolves_layers_from_the_depth() -> None:
    scores = settling_scores(0.9)
    explicit = decide_all("asl", scores, l_min=5, l_obs=4, tau=0)
    default = decide_all("asl", scores, tau=0)
    assert [d.ratio for d in default] == [d.ratio for d in explicit]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_kept_and_propagated(name: str) -> None:
    scores = settling_scores(0.5)
    decisions = decide_all(name, scores, l_min=2, l_obs=2)
    for decision, head_scores in zip(decisions, scores, strict=False):
        want = kept_per_head(head_scores, KEPT, WINDOW)
        assert torch.equal(decision.kept, want)
        if decision.propagated is not None:
            want = propagated_tokens(head_scores.sum(0), KEPT, WINDOW)
            assert torch.equal(decision.propagated, want)


def test_snapkv_never_selects() -> None:
    decisions = decide_all("snapkv", settling_scores(0.1), tau=9, selection_layer=3)
    assert len(decisions) == LAYERS
    assert all(d.propagated is None and d.ratio is None for d in decisions)


@pytest.mark.parametrize("layer", [0, 3, LAYERS - 1])
def test_a_fixed_layer_needs_no_ranks(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("ranked")

    monkeypatch.setattr("asl_vllm.selection.settling.descending_ranks", refuse)
    decisions = decide_all("asl", settling_scores(0.1), tau=9, selection_layer=layer)
    assert len(decisions) == layer + 1
    assert decisions[-1].propagated is not None
    assert all(d.ratio is None for d in decisions)


def test_only_observed_layers_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = 0

    def count(scores: Tensor) -> Tensor:
        nonlocal ranked
        ranked += 1
        return scores.argsort()

    monkeypatch.setattr("asl_vllm.selection.settling.descending_ranks", count)
    decide_all("asl", settling_scores(0.9)[:10], l_min=9, l_obs=3)
    assert ranked == 3


def test_identical_layers_count_as_settled() -> None:
    scores = settling_scores(1.0)[:1] * LAYERS
    decisions = decide_all("asl", scores, l_min=5, l_obs=4)
    assert [d.ratio for d in decisions[5:]] == [1.0, 0.0]
    assert decisions[-1].propagated is not None


def test_movement_after_identical_layers_is_not_settled() -> None:
    scores = settling_scores(1.0)[:1] * 6 + settling_scores(1.0)[6:7]
    decisions = decide_all("asl", scores, l_min=5, l_obs=4)
    assert [d.ratio for d in decisions[5:]] == [1.0, math.inf]


def test_equal_scores_keep_the_latest_tokens() -> None:
    decisions = decide_all("asl", [torch.ones(KV_HEADS, PREFIX)], selection_layer=0)
    latest = torch.arange(PREFIX + WINDOW - KEPT, PREFIX + WINDOW)
    assert torch.equal(decisions[0].kept, latest.expand(KV_HEADS, -1))
    assert decisions[0].propagated is not None
    assert torch.equal(decisions[0].propagated, latest)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [0, 5, 6])
@pytest.mark.parametrize("name", POLICIES)
def test_scores_that_are_not_finite(name: str, layer: int, bad: float) -> None:
    for where in ("head", "layer"):
        config = AslConfig(policy=name, window=WINDOW, tau=0)
        policy = make_policy(name, config, num_layers=LAYERS, kept_tokens=KEPT)
        with pytest.raises(SelectionError, match=rf"layer {layer}: .* not finite"):
            for number, head_scores in enumerate(settling_scores(0.9)):
                layer_score = head_scores.sum(0)
                if number == layer:
                    broken = head_scores[1] if where == "head" else layer_score
                    broken[17] = bad
                policy.decide(number, layer_score, head_scores)


@pytest.mark.parametrize("options", [{}, {"selection_layer": 3}], ids=["adaptive", "3"])
@pytest.mark.parametrize("name", POLICIES)
def test_one_read_a_layer(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0

    def counted(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            return method(*arguments)

        return call

    for method in [
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
    ]:
        monkeypatch.setattr(Tensor, method, counted(getattr(Tensor, method)))
    monkeypatch.setattr(Tensor, "nonzero", None)
    decisions = decide_all(name, settling_scores(0.5), l_min=3, l_obs=2, **options)
    assert reads == len(decisions)


def test_names() -> None:
    assert set(POLICIES) == set(POLICY_NAMES) - {"none"}
    for name in ("none", "h2o", ""):
        message = rf"kv policy: got '{name}'; allowed .*asl, snapkv"
        with pytest.raises(ConfigError, match=message):
            make_policy(name, AslConfig(), num_layers=4, kept_tokens=40)


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_of_only_the_window_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="kept_tokens: got 32; allowed: above the win"):
        make_policy(name, AslConfig(), num_layers=4, kept_tokens=32)
