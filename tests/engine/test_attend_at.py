"""Attention of tokens with gaps between them equals that of its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asl_vllm.engine.worker.attend_at import attend_at
from asl_vllm.prefill import Known

KEYS, DIM, VALUE_DIM, SCALE = 700, 16, 24, 0.3


def _random(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _defined(query: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query at a time, in float64; query head h reads KV head h // group."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    of = torch.arange(heads) // (heads // kv_heads)
    rows = []
    for row, position in zip(query.double(), positions.tolist(), strict=True):
        seen = slice(0, position + 1)
        scores = torch.einsum("hd,thd->ht", row, keys[seen].double()[:, of]) * SCALE
        weights = scores.softmax(1)
        rows.append(torch.einsum("ht,thd->hd", weights, values[seen].double()[:, of]))
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("n", [1, 64, 65, 150])
def test_each_query_sees_the_keys_up_to_its_own(
    heads: int, kv_heads: int, n: int
) -> None:
    generator = torch.Generator().manual_seed(n)
    positions = torch.randperm(KEYS, generator=generator)[:n].sort().values
    query = _random(n, heads, DIM, seed=1)
    keys = _random(KEYS, kv_heads, DIM, seed=2)
    values = _random(KEYS, kv_heads, VALUE_DIM, seed=3)
    # What lies behind the last position is of no token of theirs.
    keys[positions[-1] + 1 :] = float("nan")
    output = torch.full((n, heads * VALUE_DIM), float("nan"))
    attend_at(query, positions, [Known(keys, values)], [n], SCALE, output)
    expected = _defined(query, positions, keys, values)
    torch.testing.assert_close(output.view_as(expected), expected.float())


def test_the_first_token_sees_itself_alone() -> None:
    query, keys = _random(1, 2, DIM, seed=1), _random(3, 2, DIM, seed=2)
    values, output = _random(3, 2, DIM, seed=3), torch.empty(1, 2, DIM)
    attend_at(query, torch.tensor([0]), [Known(keys, values)], [1], SCALE, output)
    torch.testing.assert_close(output, values[:1])


def test_a_query_sees_the_keys_of_its_own_sequence() -> None:
    lengths, sizes = [3, 1, 5], [40, 9, 700]
    known = [
        Known(_random(n, 2, DIM, seed=n), _random(n, 2, VALUE_DIM, seed=n + 1))
        for n in sizes
    ]
    at = [torch.arange(n)[-k:] for n, k in zip(sizes, lengths, strict=True)]
    query = _random(9, 4, DIM, seed=1)
    output = torch.full((9, 4, VALUE_DIM), float("nan"))
    attend_at(query, torch.cat(at), known, lengths, SCALE, output)
    parts = zip(query.split(lengths), at, known, strict=True)
    expected = [_defined(q, p, own.keys, own.values) for q, p, own in parts]
    torch.testing.assert_close(output, torch.cat(expected).float())
