"""Names of the metrics that a server exports, as Prometheus sees them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

# Found without importing it, which takes seconds.
VLLM = Path(importlib.util.find_spec("vllm").origin).parent

OURS = {
    "vllm:asl_requests": "counter",
    "vllm:asl_pruned_tokens": "counter",
    "vllm:asl_freed_blocks": "counter",
    "vllm:asl_reused_tokens": "counter",
    "vllm:asl_filled_tokens": "counter",
    "vllm:asl_reuse_requests": "counter",
    "vllm:asl_pinned_blocks": "gauge",
    "vllm:asl_token_layers": "counter",
    "vllm:asl_selection_layer": "histogram",
    "vllm:asl_kept_tokens": "histogram",
    "vllm:asl_prefill_seconds": "histogram",
}

LABELS = {
    *("model_name", "engine", "le"),
    # of requests
    *("policy", "outcome", "result"),
    # of token-layers
    "kind",
    # of vLLM's waiting requests
    "reason",
    # that Prometheus adds
    *("job", "instance"),
}

# `name=` of a metric, and the class that makes it, in vLLM's source.
_MADE = re.compile(r'self\._(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"')

_SUFFIXES = {
    "gauge": ("",),
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def vllm_metrics() -> dict[str, str]:
    """Name -> type of vLLM's own metrics, read from its source: no engine needed."""
    source = (VLLM / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    metrics = {name: type_ for type_, name in _MADE.findall(source)}
    assert metrics["vllm:kv_cache_usage_perc"] == "gauge"
    assert len(metrics) > 20
    return metrics


def series() -> set[str]:
    """The names of all time series, suffixes included."""

    def exported(metrics: dict[str, str]) -> Iterator[str]:
        for name, type_ in metrics.items():
            stem = name.removesuffix("_total") if type_ == "counter" else name
            yield from (stem + suffix for suffix in _SUFFIXES[type_])

    return {"up", *exported(vllm_metrics()), *exported(OURS)}
