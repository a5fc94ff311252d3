"""The configuration object: defaults, scaling with depth, refusals, round trips."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from asl_vllm.config import (
    BUILT_IN_POLICIES,
    CONFIG_KEY,
    POLICY_NAMES,
    PRESETS,
    AslConfig,
    ConfigError,
)


def test_defaults_are_the_reference_settings() -> None:
    config = AslConfig()
    assert config.policy == "none"
    assert config.budget is None
    assert (config.window, config.pool_kernel) == (32, 7)
    assert (config.resolved_l_min(32), config.resolved_l_obs(32)) == (10, 8)
    assert config.resolved_tau(32) == 0.3
    assert config.selection_layer is None
    assert (config.propagated_share, config.decay_ratio) == (0.2, 0.9)
    assert config.reuse == "read"


@pytest.mark.parametrize(
    ("layers", "options", "tau"),
    [
        (10, {}, 0.9),
        (13, {}, 0.9),
        (14, {}, 0.3),
        (16, {}, 0.3),
        (80, {}, 0.3),
        (32, {"l_obs": 3}, 0.3),
        (10, {"l_obs": 4}, 0.9),
        (10, {"tau": 0.0}, 0.0),
        (10, {"tau": 0.5}, 0.5),
    ],
)
def test_tau_suits_the_depth(layers: int, options: dict[str, Any], tau: float) -> None:
    assert AslConfig(policy="asl", **options).resolved_tau(layers) == tau


def test_policies_are_named() -> None:
    assert POLICY_NAMES[:6] == ("none", *BUILT_IN_POLICIES)
    assert len(set(POLICY_NAMES)) == len(POLICY_NAMES)


def test_enabled_unless_none() -> None:
    assert not AslConfig().enabled
    assert all(AslConfig(policy=p).enabled for p in POLICY_NAMES if p != "none")


@pytest.mark.parametrize(
    ("layers", "l_min", "l_obs"),
    [
        (1, 1, 2),
        (4, 1, 2),
        (8, 2, 2),
        (16, 5, 4),
        (28, 9, 7),
        (32, 10, 8),
        (80, 25, 20),
    ],
)
def test_layers_scale_with_depth(layers: int, l_min: int, l_obs: int) -> None:
    config = AslConfig()
    assert config.resolved_l_min(layers) == l_min
    assert config.resolved_l_obs(layers) == l_obs


@pytest.mark.parametrize(
    ("layers", "of_15", "of_13"),
    [(1, 0, 0), (2, 1, 1), (8, 4, 3), (10, 5, 4), (28, 13, 11), (32, 15, 13)],
)
def test_selection_layers_scale_with_depth(layers: int, of_15: int, of_13: int) -> None:
    config = AslConfig()
    assert config.resolved_selection_layer(layers, 15) == of_15
    assert config.resolved_selection_layer(layers, 13) == of_13
    assert AslConfig(selection_layer=3).resolved_selection_layer(layers, 15) == 3


def test_given_layers_do_not_scale() -> None:
    config = AslConfig(l_min=1, l_obs=2)
    assert config.resolved_l_min(32) == 1
    assert config.resolved_l_obs(32) == 2


def test_the_papers_settings_have_a_name() -> None:
    paper = AslConfig.from_dict({"policy": "asl", "preset": "paper"})
    assert (paper.window, paper.pool_kernel) == (32, 7)
    for layers in (10, 13, 32, 80):
        assert paper.resolved_tau(layers) == 0.3
    assert (paper.resolved_l_min(30), paper.resolved_l_obs(30)) == (9, 8)
    assert AslConfig.from_dict(json.loads(json.dumps(paper.to_dict()))) == paper


def test_what_is_given_wins_over_a_preset() -> None:
    given = {"tau": 0.5, "window": 8}
    config = AslConfig.from_dict({"preset": "paper", **given})
    assert (config.tau, config.window, config.pool_kernel) == (0.5, 8, 7)


@pytest.mark.parametrize(
    "name", ["window", "pool_kernel", "reach", "score_layers", "tau"]
)
def test_a_default_that_is_given_wins_over_a_preset(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also null, and also where the preset has another value than the default."""
    default = getattr(AslConfig(), name)
    monkeypatch.setitem(PRESETS, "other", {name: 5})
    assert getattr(AslConfig.from_dict({"preset": "other"}), name) == 5
    given = AslConfig.from_dict({"preset": "other", name: default})
    assert getattr(given, name) == default


def test_frozen_and_keyword_only() -> None:
    config = AslConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        AslConfig("asl")  # type: ignore[misc]


def test_round_trip_through_json() -> None:
    config = AslConfig(policy="asl", budget=0.25, window=16, l_min=3, tau=0, l_obs=2)
    travelled = json.loads(json.dumps({CONFIG_KEY: config.to_dict()}))[CONFIG_KEY]
    assert AslConfig.from_dict(travelled) == config


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key\(s\) a, windw; allowed: .*tau"):
        AslConfig.from_dict({"windw": 8, "a": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "h2o"}, "kv policy: got 'h2o'; allowed: none, asl, fastkv, "),
        ({"policy": None}, "kv policy: got None"),
        ({"preset": "papers"}, "preset: got 'papers'; allowed: paper, or null."),
        ({"preset": []}, "preset: got []; allowed: paper, or null."),
        ({"window": 0}, "window: got 0; allowed: 1 to 64"),
        ({"window": 65}, "window: got 65; allowed: 1 to 64"),
        ({"window": True}, "window: got True; allowed: an integer"),
        ({"window": 8.0}, "window: got 8.0; allowed: an integer"),
        ({"pool_kernel": 6}, "pool_kernel: got 6; allowed: odd"),
        ({"pool_kernel": 65}, "pool_kernel: got 65; allowed: 1 to 63"),
        ({"reach": 0}, "reach: got 0; allowed: 1 to 64"),
        ({"reach": 65}, "reach: got 65; allowed: 1 to 64"),
        ({"score_layers": 0}, "score_layers: got 0; allowed: at least 1"),
        ({"bands": 0}, "bands: got 0; allowed: at least 1"),
        ({"bands": 2.0}, "bands: got 2.0; allowed: an integer"),
        ({"l_min": 0}, "l_min: got 0; allowed: at least 1"),
        ({"l_obs": 1}, "l_obs: got 1; allowed: at least 2"),
        ({"selection_layer": -1}, "selection_layer: got -1; allowed: at least 0"),
        ({"selection_layer": "9"}, "selection_layer: got '9'; allowed: an integer"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens: got 0; allowed: at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens: got 0; allowed: at least 1"),
        ({"propagated_share": 0}, "propagated_share: got 0; allowed: above 0, up to 1"),
        ({"propagated_share": 1.1}, "propagated_share: got 1.1; allowed: above 0"),
        ({"decay_ratio": -0.5}, "decay_ratio: got -0.5; allowed: above 0, up to 1"),
        ({"decay_ratio": True}, "decay_ratio: got True; allowed: a number"),
        ({"decay_ratio": "1"}, "decay_ratio: got '1'; allowed: a number"),
        ({"decay_ratio": float("nan")}, "decay_ratio: got nan; allowed: above 0"),
        (
            {"hidden_memory": "disk"},
            "hidden_memory: got 'disk'; allowed: device, host.",
        ),
        ({"pass_share": 0}, "pass_share: got 0; allowed: above 0, up to 1"),
        ({"pass_share": 1.5}, "pass_share: got 1.5; allowed: above 0, up to 1"),
        ({"pass_share": float("nan")}, "pass_share: got nan; allowed: above 0"),
        ({"pass_share": True}, "pass_share: got True; allowed: a number"),
        ({"pass_share": "1"}, "pass_share: got '1'; allowed: a number"),
        ({"check_integrity": 1}, "check_integrity: got 1; allowed: true, false"),
        ({"tau": -0.1}, "tau: got -0.1; allowed: a number of at least 0"),
        ({"tau": True}, "tau: got True; allowed: a number"),
        ({"tau": "1"}, "tau: got '1'; allowed: a number"),
        ({"tau": float("nan")}, "tau: got nan; allowed: a number"),
        ({"tau": float("inf")}, "tau: got inf; allowed: a finite number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        AslConfig.from_dict(options)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 64},
        {"pool_kernel": 1},
        {"pool_kernel": 63},
        {"tau": 0},
        {"propagated_share": 1},
        {"decay_ratio": 0.001},
        {"pass_share": 1},
        {"pass_share": 0.001},
    ],
)
def test_limits_are_allowed(options: dict[str, Any]) -> None:
    assert AslConfig(**options).to_dict().items() >= options.items()
