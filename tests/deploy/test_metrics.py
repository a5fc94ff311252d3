"""The names that the dashboard and the alerts are held against are those exported."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from asl_vllm.engine.scheduler import metrics
from asl_vllm_testing import ROOT
from tests.deploy.metrics import LABELS, OURS


def test_our_metrics_have_the_names_and_labels_that_are_listed() -> None:
    made: dict[str, tuple[str, set[str]]] = {}

    def recorder(kind: str) -> type:
        class Recorder:
            def __init__(self, *, name: str, labelnames: Any, **_: Any) -> None:
                made[name] = (kind, set(labelnames))

            def labels(self, *_: Any) -> Recorder:
                return self

        return Recorder

    kinds = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}
    metrics.PruningPromMetrics(
        SimpleNamespace(
            additional_config={},
            kv_transfer_config=None,
            parallel_config=None,
            model_config=SimpleNamespace(
                max_model_len=4096, get_num_layers=lambda _: 32
            ),
        ),
        {cls: recorder(kind) for cls, kind in kinds.items()},
        ["model_name", "engine"],
        {0: ["model", "0"]},
    )
    assert {name: kind for name, (kind, _) in made.items()} == OURS
    every = {"model_name", "engine"}
    for _, labels in made.values():
        assert every <= labels <= LABELS
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\S+?)(?:\{(.+)\})?` \| (\w+) \|", text, re.M)
    documented = {
        name.removesuffix("_total"): (kind, {*filter(None, labels.split(","))} | every)
        for name, labels, kind in rows
    }
    assert documented == made
