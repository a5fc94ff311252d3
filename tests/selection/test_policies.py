"""Policies: when they select, what they keep, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm.config import BUILT_IN_POLICIES, AslConfig, ConfigError
from asl_vllm.selection import (
    POLICIES,
    Keep,
    LayerDecision,
    Policy,
    SelectionError,
    best_and_tail,
    decide,
    make_policy,
)
from asl_vllm.selection.together import score_together

LAYERS, KV_HEADS, WINDOW, PREFIX, KEPT = 16, 2, 8, 120, 40
ANY_SCORED = torch.ones(WINDOW, 2, 16), torch.ones(60, 2, 16), 0.25


def settling_scores(settle: float, layers: int = LAYERS, seed: int = 0) -> list[Tensor]:
    """Head scores per layer whose noise shrinks by the factor ``settle`` a layer."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(KV_HEADS, PREFIX, generator=generator)
    return [
        base + settle**layer * torch.rand(KV_HEADS, PREFIX, generator=generator)
        for layer in range(layers)
    ]


def make(name: str, **options: Any) -> Policy:
    config = AslConfig(policy=name, window=WINDOW, **options)
    return make_policy(name, config, num_layers=LAYERS, kept_tokens=KEPT)


def ask(policy: Policy, layer: int, head_scores: Tensor) -> LayerDecision:
    tokens = head_scores.shape[1] + policy.tail
    return decide(policy, layer, tokens, head_scores.sum(0), head_scores)


def decide_all(name: str, scores: list[Tensor], **options: Any) -> list[LayerDecision]:
    """Decisions up to the first that drops tokens; scores of fewer are others."""
    policy = make(name, **options)
    decisions = []
    for layer, head_scores in enumerate(scores):
        decisions.append(ask(policy, layer, head_scores))
        if isinstance(decisions[-1].deeper, Tensor):
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
    assert isinstance(decisions[-1].deeper, Tensor) == bool(settled)
    assert all(decision.ratio is None for decision in decisions[:l_min])
    ratios = [decision.ratio for decision in decisions[l_min:]]
    assert ratios == pytest.approx(want[: len(ratios)], rel=1e-9)


def test_asl_resolves_layers_from_the_depth() -> None:
    scores = settling_scores(0.9)
    explicit = decide_all("asl", scores, l_min=5, l_obs=4, tau=0)
    default = decide_all("asl", scores, tau=0)
    assert [d.ratio for d in default] == [d.ratio for d in explicit]


@pytest.mark.parametrize("name", ["asl", "snapkv", "fastkv"])
def test_what_is_kept_and_what_goes_deeper(name: str) -> None:
    scores = settling_scores(0.5)
    decisions = decide_all(name, scores, l_min=2, l_obs=2, propagated_share=0.01)
    assert (decisions[-1].deeper is Keep.ALL) == (name == "snapkv")
    for decision, head_scores in zip(decisions, scores, strict=False):
        want = best_and_tail(head_scores, KEPT, WINDOW)
        assert decision.kept is not Keep.NONE
        assert torch.equal(decision.kept, want)
        assert not decision.restart
        if isinstance(decision.deeper, Tensor):
            want = best_and_tail(head_scores.sum(0), KEPT, WINDOW)
            assert torch.equal(decision.deeper, want)


@pytest.mark.parametrize("name", ["asl", "snapkv", "fastkv"])
def test_scores_are_those_of_the_window(name: str) -> None:
    policy = make(name, pool_kernel=5, reach=4)
    q, k = torch.randn(WINDOW, 4, 16), torch.randn(100, 2, 16)
    got = policy.score(0, q, k, 0.25)
    assert got is not None
    want = window_scores(q, k, scale=0.25, pool_kernel=5, reach=4)
    assert torch.equal(got[0], want)
    torch.testing.assert_close(got[1], want.sum(0))
    (together,) = score_together(policy.config, q, k, [100], 0.25)
    assert torch.equal(together[0], want)


@pytest.mark.parametrize("count", [1, 3, 99])
def test_asl_sends_deeper_what_some_layer_scored_highest(count: int) -> None:
    scores = settling_scores(0.9)[:6]
    decision = decide_all("asl", scores, selection_layer=5, score_layers=count)[-1]
    lately = torch.stack([one.sum(0) for one in scores[-count:]])
    assert isinstance(decision.deeper, Tensor)
    want = best_and_tail(lately.amax(0), KEPT, WINDOW)
    assert torch.equal(decision.deeper, want)
    own = best_and_tail(scores[-1].sum(0), KEPT, WINDOW)
    assert torch.equal(decision.deeper, own) == (count == 1)


@pytest.mark.parametrize(
    ("share", "count"),
    [(0.2, KEPT), (0.5, 64), (0.999, 127), (1.0, None)],
)
@pytest.mark.parametrize("layer", [None, 0, 3, LAYERS - 1])
def test_fastkv_sends_a_share_deeper_after_one_layer(
    layer: int | None, share: float, count: int | None
) -> None:
    scores = settling_scores(1.0)
    options = {"selection_layer": layer, "propagated_share": share}
    decisions = decide_all("fastkv", scores, **options)
    at = 8 if layer is None else layer  # 15 of 32 is 7.5 of 16
    assert len(decisions) == (LAYERS if count is None else at + 1)
    assert all(d.deeper is Keep.ALL for d in decisions[:at])
    if count is not None:
        want = best_and_tail(scores[at].sum(0), count, WINDOW)
        assert isinstance(decisions[at].deeper, Tensor)
        assert torch.equal(decisions[at].deeper, want)


def test_gemfilter_scores_by_the_last_query() -> None:
    """By loops: dot products of all heads, averaged over five neighbours."""
    q, k = torch.randn(WINDOW, 6, 16), torch.randn(60, 2, 16)
    policy = make("gemfilter", selection_layer=3)
    assert policy.score(2, q, k, 0.25) is None
    got = policy.score(3, q, k, 0.25)
    assert got is not None
    products = torch.zeros(2, 60, dtype=torch.float64)
    for head in range(6):
        for token in range(60):
            products[head // 3, token] += (
                q[-1, head].double() @ k[token, head // 3].double()
            )
    want = torch.zeros(2, 59, dtype=torch.float64)
    for token in range(59):
        want[:, token] = products[:, max(0, token - 2) : token + 3].sum(1) / 5
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], got[0].sum(0))
    half = policy.score(3, q.bfloat16(), k.bfloat16(), 0.25)
    assert half is not None
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0].double(), want, rtol=0, atol=0.2)


@pytest.mark.parametrize("layer", [None, 0, LAYERS - 1])
def test_gemfilter_restarts_with_the_best_and_the_last(layer: int | None) -> None:
    policy = make("gemfilter", selection_layer=layer)
    at = 6 if layer is None else layer  # 13 of 32 is 6.5 of 16
    assert [policy.score(i, *ANY_SCORED) is None for i in range(LAYERS)] == [
        i != at for i in range(LAYERS)
    ]
    head_scores = settling_scores(1.0)[0]
    decision = ask(policy, at, head_scores)
    assert (decision.kept, decision.restart) == (Keep.NONE, True)
    best = head_scores.sum(0).topk(KEPT - 1).indices.tolist()
    assert isinstance(decision.deeper, Tensor)
    assert decision.deeper.tolist() == sorted([*best, PREFIX])


def test_pyramidinfer_weighs_later_rows_more() -> None:
    q, k = torch.randn(WINDOW, 4, 16), torch.randn(100, 2, 16)
    got = make("pyramidinfer").score(0, q, k, 0.25)
    rows = [
        window_scores(q[i : i + 1], k[: 93 + i], scale=0.25, pool_kernel=1)[:, :92]
        for i in range(WINDOW)
    ]
    want = sum(
        weight * row
        for weight, row in zip(torch.linspace(1, 1.2, WINDOW), rows, strict=True)
    )
    assert got is not None
    torch.testing.assert_close(got[0] * 1.2, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], got[0].sum(0))


def test_pyramidinfer_leaves_a_fifth_to_the_last_of_32_layers() -> None:
    """What docs/policies.md says of the published decay."""
    config = AslConfig(policy="pyramidinfer", window=WINDOW)
    policy = make_policy("pyramidinfer", config, num_layers=32, kept_tokens=KEPT)
    context = 10_000
    for layer in range(31):
        scores = torch.rand(1, context)
        deeper = ask(policy, layer, scores).deeper
        context = len(deeper) - WINDOW if isinstance(deeper, Tensor) else context
    assert 0.2 < context / 10_000 < 0.25


@pytest.mark.parametrize("beside", [1, 2, 3, 4, 5])
def test_pyramidinfer_keeps_the_first_tokens_at_every_budget(beside: int) -> None:
    """Four, or as many as there is room for beside the window, in this order."""
    config = AslConfig(policy="pyramidinfer", window=WINDOW)
    policy = make_policy(
        "pyramidinfer", config, num_layers=16, kept_tokens=beside + WINDOW
    )
    scores = torch.rand(KV_HEADS, PREFIX)
    scores[:, 50] = 5
    kept = ask(policy, 0, scores).kept
    assert isinstance(kept, Tensor)
    first = [0, 1, 2, 3, 50][:beside]
    assert kept[:, :beside].tolist() == [first] * KV_HEADS


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5, 0.01])
def test_pyramidinfer_sends_fewer_deeper_at_each_layer(decay: float) -> None:
    policy = make("pyramidinfer", decay_ratio=decay)
    context, seen = PREFIX, []
    for layer in range(LAYERS):
        scores = torch.rand(KV_HEADS, context)
        decision = ask(policy, layer, scores)
        seen.append(context)
        ranked = scores.sum(0)
        ranked[:4] = 99
        best = ranked.topk(KEPT - WINDOW).indices.sort().values.tolist()
        tail = list(range(context, context + WINDOW))
        assert decision.kept is not Keep.NONE
        assert decision.kept.tolist() == [best + tail] * KV_HEADS
        assert not decision.restart
        if isinstance(decision.deeper, Tensor):
            count = len(decision.deeper) - WINDOW
            best = ranked.topk(count).indices.sort().values.tolist()
            assert decision.deeper.tolist() == best + tail
            context = count
        if context == KEPT - WINDOW:
            break
    assert seen[:2] == [PREFIX] * 2
    assert seen == sorted(seen, reverse=True)
    if decay == 1.0:
        assert seen == [PREFIX] * LAYERS
    elif decay == 0.9:
        # 120 times the shares 1 - 0.1 (1 - cos(pi l / 16)) / 2 of layers 1 to 7,
        # rounded down each time.
        assert seen[:9] == [120, 120, 119, 118, 117, 115, 112, 108, 103]
    else:
        assert context == KEPT - WINDOW


def test_snapkv_never_selects() -> None:
    decisions = decide_all("snapkv", settling_scores(0.1), tau=9, selection_layer=3)
    assert len(decisions) == LAYERS
    assert all(d.deeper is Keep.ALL and d.ratio is None for d in decisions)


@pytest.mark.parametrize("layer", [0, 3, LAYERS - 1])
def test_a_fixed_layer_needs_no_ranks(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("ranked")

    monkeypatch.setattr("asl_vllm.selection.settling.descending_ranks", refuse)
    decisions = decide_all("asl", settling_scores(0.1), tau=9, selection_layer=layer)
    assert len(decisions) == layer + 1
    assert isinstance(decisions[-1].deeper, Tensor)
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
    assert isinstance(decisions[-1].deeper, Tensor)


def test_movement_after_identical_layers_is_not_settled() -> None:
    scores = settling_scores(1.0)[:1] * 6 + settling_scores(1.0)[6:7]
    decisions = decide_all("asl", scores, l_min=5, l_obs=4)
    assert [d.ratio for d in decisions[5:]] == [1.0, math.inf]


def test_equal_scores_keep_the_latest_tokens() -> None:
    decisions = decide_all("asl", [torch.ones(KV_HEADS, PREFIX)], selection_layer=0)
    latest = torch.arange(PREFIX + WINDOW - KEPT, PREFIX + WINDOW)
    assert torch.equal(decisions[0].kept, latest.expand(KV_HEADS, -1))
    assert isinstance(decisions[0].deeper, Tensor)
    assert torch.equal(decisions[0].deeper, latest)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [0, 5, 6])
@pytest.mark.parametrize("name", POLICIES)
def test_scores_that_are_not_finite(name: str, layer: int, bad: float) -> None:
    for where in ("head", "layer"):
        policy = make(name, tau=0)
        with pytest.raises(SelectionError, match=rf"layer {layer}: .* not finite"):
            for number, head_scores in enumerate(settling_scores(0.9)):
                layer_score = head_scores.sum(0)
                if number == layer:
                    broken = head_scores[1] if where == "head" else layer_score
                    broken[17] = bad
                tokens = PREFIX + policy.tail
                decide(policy, number, tokens, layer_score, head_scores)


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
    assert tuple(POLICIES) == BUILT_IN_POLICIES
    for name in ("none", "h2o", ""):
        message = rf"kv policy: got '{name}'; allowed .*asl, fastkv, "
        with pytest.raises(ConfigError, match=message):
            make_policy(name, AslConfig(), num_layers=4, kept_tokens=40)


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_of_only_the_window_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="kept_tokens: got 32; allowed: above the win"):
        make_policy(name, AslConfig(), num_layers=4, kept_tokens=32)
