"""What vLLM compiles and remembers depends on few of our options."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from asl_vllm.config import AslConfig
from asl_vllm.engine.hashed import RESERVING, HashedOptions
from asl_vllm.engine.settings import settings_of
from asl_vllm_testing.vllm_configs import engine_config

BASE = {"policy": "asl"}


def config_hash(**options: Any) -> str:
    digest: str = engine_config({**BASE, **options}).compute_hash()
    return digest


@pytest.fixture(scope="module")
def base_hash() -> str:
    return HashedOptions(asl_vllm=BASE).compute_hash()


CHANGED: dict[str, Any] = {
    "policy": "snapkv",
    "budget": 0.5,
    "bands": 2,
    "preset": "paper",
    "window": 16,
    "pool_kernel": 3,
    "reach": 8,
    "score_layers": 3,
    "l_min": 2,
    "l_obs": 3,
    "tau": 0.5,
    "selection_layer": 1,
    "propagated_share": 0.5,
    "decay_ratio": 0.5,
    "max_prefill_tokens": 100,
    "hidden_memory": "host",
    "reuse": "read",
    "chunk_tokens": 64,
    "pass_share": 0.5,
    "check_integrity": True,
}


def test_no_option_is_left_out() -> None:
    assert CHANGED.keys() == AslConfig().to_dict().keys()


@pytest.mark.parametrize("name", CHANGED)
def test_only_what_memory_depends_on_is_hashed(name: str, base_hash: str) -> None:
    changed = HashedOptions(asl_vllm={**BASE, name: CHANGED[name]}).compute_hash()
    assert (changed != base_hash) == (name in RESERVING)


def test_another_policy_and_budget_compile_no_model_again() -> None:
    first = config_hash()
    assert config_hash(policy="snapkv", budget=0.5, tau=0.5) == first
    assert config_hash(window=16) != first
    assert engine_config().compute_hash() != first, "stock vLLM reserves nothing"


def test_every_process_reads_the_options() -> None:
    config = engine_config({**BASE, "window": 16})
    sent = pickle.loads(pickle.dumps(config.additional_config))
    assert sent == {"asl_vllm": {**BASE, "window": 16}}
    assert sent.compute_hash() == config.additional_config.compute_hash()
    config.additional_config = sent
    assert settings_of(config).config.window == 16


def test_options_of_others_stay_in_the_hash() -> None:
    config = engine_config(additional_config={"asl_vllm": BASE, "other": {"x": 1}})
    assert type(config.additional_config) is dict
