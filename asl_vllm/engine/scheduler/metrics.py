"""Prometheus metrics of pruned prompts.

Counted once, in the scheduler, whatever the number of ranks; each step's counts
travel with vLLM's own statistics to one front end, which adds them to its metrics.

Touch point: the connector's ``get_kv_connector_stats``, ``build_kv_connector_stats``
and ``build_prom_metrics``, vLLM's official interface. docs/metrics.md lists them.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.buckets import build_1_2_5_buckets, histogram_buckets

from asl_vllm.engine.plan import PrunePlan
from asl_vllm.engine.settings import settings_of
from asl_vllm.prefill import PrefillReport

OUTCOMES = ("pruned", "unpruned", "failed", "aborted")
"""How a request with a budget may end."""

REUSE = ("hit", "partial", "miss", "none", "filled", "shared")
"""What a prompt found in the prefix cache: all that it may read, some of it, nothing;
``none``: it did not look; ``filled``: what an ordinary prefill put there for it;
``shared``: another one's prefill was its own."""

_KINDS = ("computed", "skipped", "reused", "rerun")
_TOTALS = ("pruned_tokens", "freed_blocks", "reused_tokens", "filled_tokens")
_COUNTS = (*_TOTALS, *_KINDS)
_SAMPLES = ("selection_layer", "kept_tokens", "prefill_seconds")


class PruningStats(KVConnectorStats):
    """What happened in an interval; ``data`` is plain, for it crosses processes.

    ``data["ended"]`` counts requests by policy and outcome, ``data["reuse"]`` pruned
    prompts by what they found; each name of `_COUNTS` holds a number and each of
    `_SAMPLES` the observations of a histogram. ``data["pinned_blocks"]`` holds the
    number at the end of each step that changed it.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {"ended": {}, "reuse": {}, "pinned_blocks": []}
        self.data |= {name: 0 for name in _COUNTS}
        self.data |= {name: [] for name in _SAMPLES}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> PruningStats:
        for policy, outcomes in other.data["ended"].items():
            for outcome, count in outcomes.items():
                self.add_ended(policy, outcome, count)
        for result, count in other.data["reuse"].items():
            self.add_reuse(result, count)
        for name in (*_COUNTS, *_SAMPLES, "pinned_blocks"):
            self.data[name] += other.data[name]
        return self

    def reduce(self) -> dict[str, int | float]:
        """The summary that vLLM logs every few seconds."""
        seconds = self.data["prefill_seconds"]
        return {
            "Pruned prompts": len(self.data["kept_tokens"]),
            "Pruned tokens": self.data["pruned_tokens"],
            "Mean pruned prefill (s)": round(sum(seconds) / max(len(seconds), 1), 3),
        }

    def add_ended(self, policy: str, outcome: str, count: int = 1) -> None:
        """Counts requests with a budget that ended."""
        assert outcome in OUTCOMES
        outcomes = self.data["ended"].setdefault(policy, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + count

    def add_reuse(self, result: str, count: int = 1) -> None:
        """Counts pruned prompts by what they found in the prefix cache."""
        assert result in REUSE
        self.data["reuse"][result] = self.data["reuse"].get(result, 0) + count

    def add_pruned(self, plan: PrunePlan, report: PrefillReport) -> None:
        """Counts a prompt that was pruned; once, however often it is prefilled."""
        held = plan.in_force(report)
        self.data["pruned_tokens"] += held.pruned_tokens
        self.data["freed_blocks"] += plan.freed_blocks(report)
        self.data["filled_tokens"] += report.filled_tokens
        self.data["kept_tokens"].append(held.kept_tokens)
        if report.selection_layer is not None:
            self.data["selection_layer"].append(report.selection_layer)

    def add_prefill(self, report: PrefillReport) -> None:
        """Counts a prefill that was run, those after a preemption included."""
        self.data["computed"] += report.computed_token_layers
        self.data["skipped"] += report.skipped_token_layers
        self.data["reused"] += report.reused_token_layers
        self.data["rerun"] += report.rerun_token_layers
        self.data["reused_tokens"] += report.reused_tokens
        self.data["prefill_seconds"].append(report.seconds)


class PruningTally:
    """Counts since the engine started, and those not yet handed to vLLM."""

    def __init__(self) -> None:
        self._interval = PruningStats()
        self._pinned_blocks = 0
        self.totals = {
            "requests": 0,
            "pruned_tokens": 0,
            "skipped_token_layers": 0,
            "computed_token_layers": 0,
            "reused_tokens": 0,
            "filled_tokens": 0,
            "shared_prefills": 0,
        }

    def prefilled(
        self, plan: PrunePlan, report: PrefillReport, reuse: str, *, again: bool
    ) -> None:
        """A pruned prefill was run; ``again`` where its request had one before.

        ``reuse``: what it found in the prefix cache, one of `REUSE`.
        """
        self._interval.add_prefill(report)
        self.totals["skipped_token_layers"] += report.skipped_token_layers
        self.totals["computed_token_layers"] += report.computed_token_layers
        self.totals["reused_tokens"] += report.reused_tokens
        if not again:
            self._interval.add_pruned(plan, report)
            self._interval.add_reuse(reuse)
            self.totals["requests"] += 1
            self.totals["filled_tokens"] += report.filled_tokens
            self.totals["pruned_tokens"] += plan.in_force(report).pruned_tokens

    def shared(self, plan: PrunePlan, report: PrefillReport) -> None:
        """A request took its pruned prompt over from another, which reported this."""
        self._interval.add_pruned(plan, report)
        self._interval.add_reuse("shared")
        self.totals["requests"] += 1
        self.totals["shared_prefills"] += 1
        self.totals["pruned_tokens"] += plan.in_force(report).pruned_tokens

    def ended(self, policy: str, outcome: str) -> None:
        """A request with a budget ended."""
        self._interval.add_ended(policy, outcome)

    def take(self, pinned_blocks: int) -> PruningStats:
        """What was counted since the last call; what is pinned now, if it changed."""
        if pinned_blocks != self._pinned_blocks:
            self._pinned_blocks = pinned_blocks
            self._interval.data["pinned_blocks"].append(pinned_blocks)
        taken, self._interval = self._interval, PruningStats()
        return taken


class PruningPromMetrics(KVConnectorPromMetrics):
    """The metrics in Prometheus' form, with vLLM's labels for model and engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        settings = settings_of(vllm_config)
        self._policy = settings.config.policy
        num_layers = settings.num_layers
        tokens = build_1_2_5_buckets(vllm_config.model_config.max_model_len)
        self._histograms = {
            name: self._histogram_cls(
                name=f"vllm:asl_{name}",
                documentation=documentation,
                buckets=buckets,
                labelnames=labelnames,
            )
            for name, documentation, buckets in (
                (
                    "selection_layer",
                    "Layer at which a pruned prompt's tokens were chosen; prompts "
                    "whose layers chose each for itself are not counted.",
                    [float(layer) for layer in range(num_layers)],
                ),
                ("kept_tokens", "Tokens kept per layer of a pruned prompt.", tokens),
                (
                    "prefill_seconds",
                    "Seconds from a pruned prefill's first pass to its last.",
                    histogram_buckets("time_to_first_token"),
                ),
            )
        }
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:asl_{name}",
                documentation=documentation,
                labelnames=[*labelnames, *labels],
            )
            for name, documentation, labels in (
                (
                    "requests",
                    "Requests with a kv_budget that ended, by policy and outcome.",
                    ("policy", "outcome"),
                ),
                ("pruned_tokens", "Prompt tokens dropped from the KV cache.", ()),
                (
                    "reused_tokens",
                    "Tokens of pruned prompts that were read from the prefix cache.",
                    (),
                ),
                (
                    "filled_tokens",
                    "Of these, tokens that an ordinary prefill computed for the pruned "
                    "one first.",
                    (),
                ),
                (
                    "reuse_requests",
                    "Pruned prompts by what they found in the prefix cache: all that "
                    "they may read (hit), partial, miss; none did not look; filled "
                    "had it computed by an ordinary prefill first; shared took over "
                    "the prefill of another with the same prompt.",
                    ("result",),
                ),
                ("freed_blocks", "KV blocks that pruned prompts did without.", ()),
                (
                    "token_layers",
                    "Tokens times layers of pruned prefills: computed; skipped, which "
                    "an unpruned prefill would have computed in addition; reused, "
                    "read from the prefix cache; rerun, both reused and computed.",
                    ("kind",),
                ),
            )
        }
        self._pinned = self._gauge_cls(
            name="vllm:asl_pinned_blocks",
            documentation="KV blocks of the prefix cache that prefills are reading.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )
        for labels in per_engine_labelvalues.values():
            self._at_zero(labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = transfer_stats_data
        labels = self.per_engine_labelvalues[engine_idx]
        for name, histogram in self._histograms.items():
            for value in data[name]:
                histogram.labels(*labels).observe(value)
        for name in _TOTALS:
            self._counters[name].labels(*labels).inc(data[name])
        for kind in _KINDS:
            self._counters["token_layers"].labels(*labels, kind).inc(data[kind])
        for result, count in data["reuse"].items():
            self._counters["reuse_requests"].labels(*labels, result).inc(count)
        for blocks in data["pinned_blocks"][-1:]:
            self._pinned.labels(*labels).set(blocks)
        for policy, outcomes in data["ended"].items():
            for outcome, count in outcomes.items():
                self._counters["requests"].labels(*labels, policy, outcome).inc(count)

    def _at_zero(self, labels: list[object]) -> None:
        """Series exist before the first event, so that rates start at zero."""
        for histogram in self._histograms.values():
            histogram.labels(*labels)
        for name in _TOTALS:
            self._counters[name].labels(*labels)
        for kind in _KINDS:
            self._counters["token_layers"].labels(*labels, kind)
        for result in REUSE:
            self._counters["reuse_requests"].labels(*labels, result)
        self._pinned.labels(*labels)
        for outcome in OUTCOMES:
            self._counters["requests"].labels(*labels, self._policy, outcome)
