"""Window scores of several requests, packed and in pages, through the wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores, window_scores_paged
from asl_vllm_testing.key_caches import LAYOUTS, fill, key_cache, kv_cache
from asl_vllm_testing.window_scores import TOLERANCES, error, naive, row_lse

WINDOW, HEADS, KV_HEADS, DIM, BLOCK_SIZE = 8, 6, 2, 48, 16
SCALE = DIM**-0.5
# M = W + 1, a whole number of blocks, a block and a token, and several.
LENGTHS = (9, 32, 17, 101)


def requests(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of each request."""
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(WINDOW, HEADS, DIM, generator=generator) for _ in LENGTHS]
    keys = [torch.randn(n, KV_HEADS, DIM, generator=generator) for n in LENGTHS]
    return [q.to(dtype) for q in queries], [k.to(dtype) for k in keys]


def paged(keys: Sequence[Tensor], layout: str = "LBNHC") -> tuple[Tensor, Tensor]:
    """The keys as `window_scores_paged` takes them: cache and block table."""
    cache = kv_cache(
        layout,
        layers=2,
        layer=1,
        blocks=16,
        kv_heads=KV_HEADS,
        block_size=BLOCK_SIZE,
        content=2 * DIM,
        dtype=keys[0].dtype,
    )
    rows = key_cache(cache, DIM)
    return rows, fill(rows, keys, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
def test_packed_requests_score_as_alone(dtype: torch.dtype, with_lse: bool) -> None:
    queries, keys = requests(dtype)
    lse = [row_lse(*pair, SCALE) for pair in zip(queries, keys, strict=True)]
    got = window_scores(
        torch.cat(queries),
        torch.cat(keys),
        scale=SCALE,
        pool_kernel=7,
        lengths=LENGTHS,
        lse=torch.cat(lse) if with_lse else None,
    )
    parts = got.split([n - WINDOW for n in LENGTHS], dim=1)
    for q, k, part in zip(queries, keys, parts, strict=True):
        assert error(part, naive(q, k, SCALE, 7)) < TOLERANCES[dtype][0]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_paged_keys_score_as_packed_ones(layout: str, dtype: torch.dtype) -> None:
    queries, keys = requests(dtype)
    q = torch.cat(queries)
    common: dict[str, Any] = {"scale": SCALE, "pool_kernel": 7}
    want = window_scores(q, torch.cat(keys), lengths=LENGTHS, **common)
    cache, table = paged(keys, layout)
    assert torch.equal(window_scores_paged(q, cache, table, LENGTHS, **common), want)


def test_layer_score_is_the_sum_over_kv_heads() -> None:
    queries, keys = requests(torch.float32)
    q, k = torch.cat(queries), torch.cat(keys)
    cache, table = paged(keys)
    common: dict[str, Any] = {"scale": SCALE, "pool_kernel": 3}
    for paging in (False, True):
        layer = torch.full((sum(LENGTHS) - len(q),), float("nan"))
        if paging:
            scores = window_scores_paged(
                q, cache, table, LENGTHS, layer_score=layer, **common
            )
        else:
            scores = window_scores(q, k, lengths=LENGTHS, layer_score=layer, **common)
        assert torch.equal(layer, scores.sum(0))


def arguments(**changed: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "q": torch.ones(8, 2, 16),
        "key_cache": torch.ones(5, 4, 1, 16),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "lengths": (5, 12),
        "scale": 1.0,
        "pool_kernel": 7,
    }
    return good | changed


def test_these_arguments_are_good() -> None:
    assert window_scores_paged(**arguments()).shape == (1, 9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.ones(8, 2)}, r"q: got shape \(8, 2\); wanted \[n \* W, H, D\]"),
        ({"q": torch.ones(9, 2, 16)}, r"got 2 requests; wanted a divisor of q's 9 row"),
        (
            {"q": torch.ones(8, 2, 8)},
            r"key_cache: got shape .*wanted .*any, any, any, 8",
        ),
        ({"key_cache": torch.ones(5, 4, 16)}, r"key_cache: got shape \(5, 4, 16\)"),
        ({"key_cache": torch.ones(5, 0, 1, 16)}, r"q, key_cache: .*no size may be 0"),
        ({"key_cache": torch.ones(5, 4, 1, 16, 2)[..., 0]}, r"key_cache: the last dim"),
        (
            {"key_cache": torch.ones(5, 4, 3, 16)},
            r"H = 2; wanted a multiple of Hkv = 3",
        ),
        ({"key_cache": torch.ones(5, 4, 1, 16, device="meta")}, r"key_cache: on meta"),
        ({"block_table": torch.zeros(2, 3)}, r"block_table: got torch\.float32; allow"),
        ({"block_table": torch.zeros(3, 3).int()}, r"block_table: got shape \(3, 3\)"),
        (
            {"block_table": torch.zeros(3, 2).int().t()},
            r"block_table: the last dimensi",
        ),
        (
            {"lengths": (5, 13)},
            r"lengths: got 13 tokens; the block table has room",
        ),
        ({"lengths": (4, 12)}, r"key_cache: got M = 4 tokens; wanted more than W = 4"),
        ({"lengths": ()}, r"lengths: got 0 requests; wanted a divisor of q's 8 rows"),
        ({"pool_kernel": 2}, r"pool_kernel: got 2; allowed: odd"),
        ({"lse": torch.ones(4, 2)}, r"lse: got shape \(4, 2\); wanted \[n \* W, H\]"),
        ({"layer_score": torch.ones(8)}, r"layer_score: got shape \(8,\); wanted .*9"),
        ({"layer_score": torch.ones(9).double()}, r"layer_score: got torch\.float64"),
        ({"layer_score": torch.ones(9, 2)[:, 0]}, r"layer_score: the last dimension"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_scores_paged(**arguments(**changed))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_quantized_caches_are_refused(dtype: torch.dtype) -> None:
    cache = torch.zeros(5, 4, 1, 16, dtype=dtype)
    with pytest.raises(ValueError, match=r"key_cache: got .*A quantized cache .*score"):
        window_scores_paged(**arguments(key_cache=cache))


def test_lengths_must_add_up() -> None:
    q, k = torch.ones(8, 2, 16), torch.ones(20, 1, 16)
    with pytest.raises(ValueError, match=r"lengths: got 19 tokens in all; k has 20"):
        window_scores(q, k, scale=1.0, pool_kernel=3, lengths=(9, 10))
