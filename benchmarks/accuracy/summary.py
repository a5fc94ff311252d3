"""Replies summed up: accuracy with an interval, layers chosen, work spent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.accuracy.cells import FULL
from benchmarks.accuracy.controls import CONTROLS

Z_95 = 1.959964
"""Standard normal quantile of a two-sided interval of 95%."""

Row = dict[str, Any]


def wilson(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share of ``n``.

    For scores between 0 and 1 that are no mere 0 or 1 it is wider than needed: their
    variance is at most that of a share with the same mean. Source: Wilson, 1927.
    """
    if n < 1:
        raise ValueError(f"n: got {n}; allowed: at least 1")
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    spread = share * (1 - share) / n + z * z / (4 * n * n)
    half = z * math.sqrt(spread) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each policy, budget, task and length, in the order of the records.

    Policies follow one another in a fixed order: unpruned, controls, the others.
    ``work`` is the token-layers computed over those of the unpruned prompt.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        key = tuple(record[k] for k in ("length", "policy", "budget", "task"))
        groups.setdefault(key, []).append(record)
    rows = []
    for (length, policy, budget, task), group in groups.items():
        score = mean(record["score"] for record in group)
        low, high = wilson(score, len(group))
        rows.append(
            {
                "task": task,
                "length": length,
                "policy": policy,
                "budget": budget,
                "n": len(group),
                "score": score,
                "low": low,
                "high": high,
                "kept_tokens": mean(record["kept_tokens"] for record in group),
                "work": _work(group),
                "kl": _mean_kl(group),
                "layers": _layers(group),
            }
        )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            row["length"],
            _place(row["policy"]),
            row["budget"] or 0,
            tasks.index(row["task"]),
        ),
    )


def _work(group: Sequence[Mapping[str, Any]]) -> float | None:
    shares = [
        record["token_layers"] / (record["prompt_tokens"] * record["num_layers"])
        for record in group
        if record["token_layers"] is not None
    ]
    return mean(shares) if shares else None


def _mean_kl(group: Sequence[Mapping[str, Any]]) -> float | None:
    """In nats a token; None: the task has right answers."""
    found = [record["kl"] for record in group if "kl" in record]
    return mean(found) if found else None


def _layers(group: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often each selection layer was chosen; "none": none was."""
    counts = Counter(record["selection_layer"] for record in group)
    chosen = sorted(layer for layer in counts if layer is not None)
    layers = {str(layer): counts[layer] for layer in chosen}
    return layers | ({"none": counts[None]} if counts[None] else {})


def _place(policy: str) -> tuple[int, str, int, str]:
    fixed = (FULL, *CONTROLS)
    if policy in fixed:
        return fixed.index(policy), "", 0, ""
    label, _, variant = policy.partition(" ")
    name, _, layer = label.partition("@")
    return len(fixed), name, int(layer or -1), variant
