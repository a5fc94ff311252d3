"""Metrics: what is counted, joined, and shown to Prometheus."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.plan import PrunePlan
from asl_vllm.engine.scheduler.metrics import OUTCOMES, PruningStats, PruningTally
from asl_vllm.prefill import PrefillReport
from asl_vllm_testing.vllm_configs import engine_config

SELECTED = PrefillReport(3, 700, 300, 0.5)
NOT_SELECTED = PrefillReport(None, 920, 0, 0.25)
PLAN = PrunePlan(
    policy="asl",
    budget=100,
    budget_tokens=100,
    num_prompt_tokens=164,
    pruned_blocks=2,
    block_size=32,
)
SHORT = dataclasses.replace(PLAN, num_prompt_tokens=92, pruned_blocks=1)
LABELS = ["model_name", "engine"]


def interval() -> PruningStats:
    tally = PruningTally()
    tally.prefilled(PLAN, SELECTED, "hit", again=False)
    tally.prefilled(PLAN, SELECTED, "miss", again=True)
    tally.prefilled(SHORT, NOT_SELECTED, "none", again=False)
    tally.ended("asl", "pruned")
    tally.ended("asl", "aborted")
    return tally.take(pinned_blocks=5)


def test_a_prompt_counts_once_and_its_prefills_each() -> None:
    assert interval().data == {
        "ended": {"asl": {"pruned": 1, "aborted": 1}},
        "reuse": {"hit": 1, "none": 1},
        "pinned_blocks": [5],
        "pruned_tokens": 96,
        "freed_blocks": 3,
        "computed": 2320,
        "skipped": 600,
        "reused": 0,
        "rerun": 0,
        "reused_tokens": 0,
        "filled_tokens": 0,
        "selection_layer": [3],
        "kept_tokens": [100, 60],
        "prefill_seconds": [0.5, 0.5, 0.25],
    }


def test_totals_go_on_and_intervals_begin_anew() -> None:
    tally = PruningTally()
    tally.prefilled(PLAN, SELECTED, "hit", again=False)
    assert not tally.take(0).is_empty()
    assert tally.take(0).is_empty()
    tally.prefilled(PLAN, SELECTED, "miss", again=True)
    assert tally.totals == {
        "requests": 1,
        "pruned_tokens": 64,
        "skipped_token_layers": 600,
        "computed_token_layers": 1400,
        "reused_tokens": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
    }


def test_pinned_blocks_are_told_when_they_change() -> None:
    tally = PruningTally()
    assert tally.take(0).is_empty()
    assert tally.take(7).data["pinned_blocks"] == [7]
    assert tally.take(7).is_empty()
    assert tally.take(0).data["pinned_blocks"] == [0]


def test_intervals_are_joined_for_the_log() -> None:
    joined = PruningStats().aggregate(interval()).aggregate(interval())
    assert joined.data["ended"] == {"asl": {"pruned": 2, "aborted": 2}}
    assert joined.data["reuse"] == {"hit": 2, "none": 2}
    assert joined.data["kept_tokens"] == [100, 60, 100, 60]
    assert joined.reduce() == {
        "Pruned prompts": 4,
        "Pruned tokens": 192,
        "Mean pruned prefill (s)": 0.417,
    }


def test_stats_cross_processes() -> None:
    data = interval().to_dict()
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(data))
    assert AslConnector.build_kv_connector_stats(sent).data == data


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Any:
    def within(kind: type) -> Any:
        return lambda **options: kind(registry=registry, **options)

    types: dict[Any, Any] = {kind: within(kind) for kind in (Counter, Gauge, Histogram)}
    config = engine_config({"policy": "asl", "window": 8})
    engines = {0: ["tiny", "0"], 1: ["tiny", "1"]}
    return AslConnector.build_prom_metrics(config, types, LABELS, engines)


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """(name, engine, further label values...) -> value; times of creation left out."""
    return {
        (
            sample.name,
            sample.labels["engine"],
            *(v for k, v in sorted(sample.labels.items()) if k not in LABELS),
        ): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_observations(metrics: Any, registry: CollectorRegistry) -> None:
    metrics.observe(interval().data, 1)
    metrics.observe(interval().data, 1)
    found = samples(registry)
    expected = {
        ("vllm:asl_requests_total", "1", "pruned", "asl"): 2,
        ("vllm:asl_requests_total", "1", "aborted", "asl"): 2,
        ("vllm:asl_requests_total", "1", "failed", "asl"): 0,
        ("vllm:asl_requests_total", "1", "unpruned", "asl"): 0,
        ("vllm:asl_pruned_tokens_total", "1"): 192,
        ("vllm:asl_freed_blocks_total", "1"): 6,
        ("vllm:asl_reuse_requests_total", "1", "hit"): 2,
        ("vllm:asl_reuse_requests_total", "1", "miss"): 0,
        ("vllm:asl_pinned_blocks", "1"): 5,
        ("vllm:asl_token_layers_total", "1", "computed"): 4640,
        ("vllm:asl_token_layers_total", "1", "skipped"): 1200,
        ("vllm:asl_selection_layer_count", "1"): 2,
        ("vllm:asl_selection_layer_sum", "1"): 6,
        ("vllm:asl_selection_layer_bucket", "1", "2.0"): 0,
        ("vllm:asl_selection_layer_bucket", "1", "3.0"): 2,
        ("vllm:asl_kept_tokens_count", "1"): 4,
        ("vllm:asl_kept_tokens_sum", "1"): 320,
        ("vllm:asl_prefill_seconds_count", "1"): 6,
        ("vllm:asl_prefill_seconds_sum", "1"): 2.5,
    }
    assert found.items() >= expected.items()


def test_an_idle_engine_has_every_series_at_zero(
    metrics: Any, registry: CollectorRegistry
) -> None:
    metrics.observe(interval().data, 1)
    idle = {key: value for key, value in samples(registry).items() if key[1] == "0"}
    assert set(idle.values()) == {0}
    outcomes = {key[2] for key in idle if key[0] == "vllm:asl_requests_total"}
    assert outcomes == set(OUTCOMES)
    assert {key[0].removesuffix("_bucket") for key in idle} >= {
        *("vllm:asl_selection_layer", "vllm:asl_kept_tokens"),
        *("vllm:asl_prefill_seconds", "vllm:asl_pruned_tokens_total"),
    }


def test_a_layer_has_a_bucket_of_its_own(
    metrics: Any, registry: CollectorRegistry
) -> None:
    bounds = [
        key[2]
        for key in samples(registry)
        if key[:2] == ("vllm:asl_selection_layer_bucket", "0")
    ]
    assert bounds == [*(f"{layer}.0" for layer in range(10)), "+Inf"]
