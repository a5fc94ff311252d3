"""Attention at positions against a naive double-precision loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.attention_at import attention_at, reference
from asl_vllm_testing.positions import positions


def naive(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_at: list[int],
    key_at: list[int],
    *,
    scale: float,
    window: int | None,
    soft_cap: float,
    sinks: Tensor | None,
) -> Tensor:
    n, heads, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros(n, heads, values.shape[2], dtype=torch.float64)
    for row, p in enumerate(query_at):
        seen = [
            j
            for j, at in enumerate(key_at)
            if at <= p and (window is None or p - at < window)
        ]
        for head in range(heads):
            total = math.exp(float(sinks[head])) if sinks is not None else 0.0
            for j in seen:
                x = float(query[row, head].double() @ keys[j, head // group].double())
                x *= scale
                x = soft_cap * math.tanh(x / soft_cap) if soft_cap else x
                total += math.exp(x)
                out[row, head] += math.exp(x) * values[j, head // group].double()
            if total:
                out[row, head] /= total
    return out


@pytest.mark.parametrize("window", [None, 1, 9, 1000])
@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(0.0, False), (2.0, True)])
def test_matches_naive(window: int | None, soft_cap: float, has_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    key_at = positions(60, 31)
    # The second half of the rows, as a chunk of a pass has them.
    query_at = key_at[15:]
    query = torch.randn(16, 6, 16, generator=generator)
    keys = torch.randn(31, 2, 16, generator=generator)
    values = torch.randn(31, 2, 24, generator=generator)
    sinks = torch.randn(6, generator=generator) if has_sinks else None
    out = torch.empty(16, 6, 24)
    given: dict[str, Any] = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
    attention_at(query, keys, values, query_at, key_at, scale=0.3, out=out, **given)
    want = naive(
        query, keys, values, query_at.tolist(), key_at.tolist(), scale=0.3, **given
    )
    assert float((out - want).abs().max()) < 2e-6


def test_queries_between_the_keys_see_those_before_them() -> None:
    keys = torch.randn(3, 1, 8)
    values = torch.eye(3)[:, None]
    at = torch.tensor([2, 5, 9])
    out = torch.empty(4, 1, 3)
    query = torch.zeros(4, 1, 8)
    where = torch.tensor([1, 2, 7, 20])
    attention_at(query, keys, values, where, at, scale=1.0, out=out, window=12)
    assert out[:, 0].tolist() == [[0, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    at = positions(90, 40)
    query, keys = torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    whole, tiled = torch.empty(40, 2, 8), torch.empty(40, 2, 8)
    attention_at(query, keys, keys, at, at, scale=0.4, out=whole, window=20)
    monkeypatch.setattr(reference, "_TILE", 7)
    attention_at(query, keys, keys, at, at, scale=0.4, out=tiled, window=20)
    torch.testing.assert_close(tiled, whole)


def test_bad_arguments() -> None:
    q, k = torch.ones(2, 4, 8), torch.ones(5, 2, 8)
    at, of = torch.arange(2), torch.arange(5)
    out = torch.empty(2, 4, 8)

    def refused(message: str, *given: Tensor, **changes: Any) -> None:
        arguments = {"scale": 1.0, "out": out, **changes}
        with pytest.raises(ValueError, match=message):
            attention_at(*given, **arguments)

    refused(r"keys: got shape \(5, 2, 7\)", q, k[..., :7], k, at, of)
    refused(r"values: got shape \(4, 2, 8\)", q, k, k[:4], at, of)
    refused(r"out: got shape \(1, 4, 8\)", q, k, k, at, of, out=out[:1])
    refused(r"query_positions: got shape \(3,\)", q, k, k, of[:3], of)
    refused(r"key_positions: got torch\.int32", q, k, k, at, of.int())
    refused(
        r"4 heads; wanted a multiple of the 3 KV",
        q,
        k[:, :1].repeat(1, 3, 1),
        k[:, :1].repeat(1, 3, 1),
        at,
        of,
    )
    refused(r"keys: got torch\.float16", q, k.half(), k, at, of)
    refused(r"keys: on meta", q, k.to("meta"), k, at, of)
    refused(
        r"values: the last dimension has stride 2",
        q,
        k,
        k.repeat(1, 1, 2)[..., ::2],
        at,
        of,
    )
    refused(r"sinks: got shape \(2,\)", q, k, k, at, of, sinks=torch.ones(2))
    refused("window: got 0; allowed: at least 1", q, k, k, at, of, window=0)
    refused("soft_cap: got -1", q, k, k, at, of, soft_cap=-1.0)
