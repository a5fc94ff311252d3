"""The attention kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.attention_at import reference
from asl_kernels.attention_at import triton as kernels
from asl_vllm_testing.positions import positions
from tests.triton.device import DEVICE, on_device

pytestmark = pytest.mark.usefixtures("poison")

# Weights are rounded to the values' dtype before they meet them.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_at: Tensor,
    key_at: Tensor,
    *,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    n, heads, dim = query.shape
    shape = n, heads, values.shape[2]
    given = query, keys, values, query_at, key_at
    rest = window, soft_cap
    want = torch.empty(shape)
    floats = [tensor.float() for tensor in given[:3]]
    reference.attention_at(*floats, query_at, key_at, dim**-0.5, want, *rest, sinks)
    got = torch.empty(shape, dtype=query.dtype, device=DEVICE)
    kernels.attention_at(
        *map(on_device, given),
        dim**-0.5,
        got,
        *rest,
        None if sinks is None else on_device(sinks),
    )
    error = float((got.cpu().float() - want).abs().max())
    assert error < TOLERANCES[query.dtype], error


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "first", "heads", "kv_heads", "dim", "value_dim", "window"),
    [
        (1, 0, 1, 1, 16, 16, 1),
        (70, 0, 4, 2, 16, 16, 13),
        (150, 85, 2, 1, 80, 32, 40),
        (150, 149, 2, 2, 64, 64, None),
    ],
)
def test_matches_the_reference(
    tokens: int,
    first: int,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    at = positions(2 * tokens, tokens)
    query = random(dtype, tokens - first, heads, dim)
    keys = random(dtype, tokens, kv_heads, dim)
    values = random(dtype, tokens, kv_heads, value_dim)
    check(query, keys, values, at[first:], at, window=window)


@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(3.0, False), (0.0, True)])
def test_caps_and_sinks(soft_cap: float, has_sinks: bool) -> None:
    at = positions(200, 90)
    query, keys = random(torch.float32, 90, 2, 16), random(torch.float32, 90, 1, 16)
    sinks = torch.randn(2) if has_sinks else None
    check(query, keys, keys, at, at, window=30, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_queries_that_see_nothing(has_sinks: bool) -> None:
    """In a block with others, and before the first key."""
    query, keys = random(torch.float32, 40, 1, 16), random(torch.float32, 60, 1, 16)
    query_at = torch.arange(40) * 10
    key_at = torch.arange(100, 160)
    sinks = torch.ones(1) if has_sinks else None
    check(query, keys, keys, query_at, key_at, window=5, sinks=sinks)


def test_strided_rows() -> None:
    at = torch.arange(40)
    packed: Any = random(torch.float32, 40, 2, 3, 16)
    out = torch.full((40, 3, 2, 16), 7.0, device=DEVICE)
    placed = on_device(packed)
    views = placed[:, :, 0], placed[:, :, 1], placed[:, :, 2]
    kernels.attention_at(
        *views, on_device(at), on_device(at), 0.25, out[:, 1], 9, 0.0, None
    )
    want = torch.empty(40, 2, 16)
    reference.attention_at(*packed.unbind(2), at, at, 0.25, want, 9, 0.0, None)
    torch.testing.assert_close(out[:, 1].cpu(), want, atol=1e-5, rtol=1e-5)
    assert bool((out[:, [0, 2]] == 7.0).all())
