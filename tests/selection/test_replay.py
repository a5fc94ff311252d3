"""Replay's shape of results and its refusals; tests/golden has the numbers."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from asl_vllm.config import AslConfig, ConfigError
from asl_vllm.selection import ReplayResult, replay

LAYERS, HEADS, KV_HEADS, WINDOW, TOKENS, DIM, BUDGET = 6, 4, 2, 8, 60, 16, 20
CONFIG = AslConfig(policy="asl", window=WINDOW, l_min=2, l_obs=2)


def run(
    config: AslConfig = CONFIG, budget: int = BUDGET, num_layers: int | None = None
) -> ReplayResult:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(LAYERS, HEADS, WINDOW, DIM, generator=generator)
    k = torch.randn(LAYERS, KV_HEADS, TOKENS, DIM, generator=generator)
    return replay(q, k, config, budget=budget, num_layers=num_layers)


def test_without_a_selection() -> None:
    result = run(dataclasses.replace(CONFIG, tau=0))
    assert result.ranks.shape == (LAYERS, TOKENS - WINDOW)
    assert len(result.ratios) == LAYERS - 2
    assert result.ratios[0] == 1.0
    assert result.selection_layer is None
    assert result.deeper is None
    assert [tuple(kept.shape) for kept in result.kept] == [(KV_HEADS, BUDGET)] * LAYERS


def test_stops_at_the_selection() -> None:
    result = run(dataclasses.replace(CONFIG, selection_layer=3))
    assert result.selection_layer == 3
    assert result.ranks.shape[0] == len(result.kept) == 4
    assert result.ratios == ()
    assert result.deeper is not None
    assert result.deeper.shape == (BUDGET,)
    top = (result.ranks[3] <= BUDGET - WINDOW).nonzero().squeeze(1)
    assert torch.equal(result.deeper[:-WINDOW], top)


def test_stops_where_tokens_are_dropped() -> None:
    """Deeper keys of the recording are those of all tokens."""
    config = dataclasses.replace(CONFIG, selection_layer=2, propagated_share=0.5)
    fast = run(dataclasses.replace(config, policy="fastkv"))
    assert (fast.selection_layer, len(fast.kept)) == (2, 3)
    assert fast.deeper is not None
    assert fast.deeper.shape == (TOKENS // 2,)
    pyramid = run(dataclasses.replace(config, policy="pyramidinfer"))
    assert (pyramid.selection_layer, len(pyramid.kept)) == (1, 2)
    assert pyramid.deeper is not None
    assert BUDGET < len(pyramid.deeper) < TOKENS


def test_gemfilter_is_replayed_up_to_its_choice() -> None:
    config = dataclasses.replace(CONFIG, policy="gemfilter", selection_layer=4)
    result = run(config)
    assert result.selection_layer == 4
    assert result.kept == ()
    assert result.ranks.shape == (1, TOKENS - 1)
    assert result.deeper is not None
    top = (result.ranks[0] < BUDGET).nonzero().squeeze(1)
    assert torch.equal(result.deeper, torch.cat([top, torch.tensor([TOKENS - 1])]))
    config = dataclasses.replace(config, selection_layer=LAYERS)
    with pytest.raises(ValueError, match="got 6 layers, of which gemfilter looks at"):
        run(config)


def test_depth_scales_the_layers() -> None:
    config = AslConfig(policy="asl", window=WINDOW, tau=0)
    assert len(run(config).ratios) == LAYERS - 2
    assert len(run(config, num_layers=16).ratios) == LAYERS - 5


def test_budget_may_be_the_whole_prompt() -> None:
    kept = run(budget=TOKENS).kept[0]
    assert torch.equal(kept, torch.arange(TOKENS).expand(KV_HEADS, -1))


@pytest.mark.parametrize("budget", [0, WINDOW, TOKENS + 1])
def test_bad_budgets(budget: int) -> None:
    with pytest.raises(
        ValueError, match=rf"(count|kept_tokens): got {budget}; allowed"
    ):
        run(budget=budget)


def test_a_policy_is_needed() -> None:
    with pytest.raises(ConfigError, match="kv policy: got 'none'"):
        run(AslConfig(window=WINDOW))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "message"),
    [
        ((2, 4, 8), (2, 2, 60, 16), "wanted [L, H, W, D] and [L, Hkv, N, D]"),
        ((2, 4, 8, 16), (3, 2, 60, 16), "got 2 and 3 layers"),
        ((0, 4, 8, 16), (0, 2, 60, 16), "at least one"),
        ((2, 4, 9, 16), (2, 2, 60, 16), "got W = 9; the config's window is 8"),
        ((2, 4, 8, 16), (2, 2, 60, 32), "k: got shape (60, 2, 32)"),
    ],
)
def test_bad_shapes(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replay(torch.ones(q_shape), torch.ones(k_shape), CONFIG, budget=BUDGET)
