"""Window scores of several requests, packed and in pages, against the reference.

Workspaces and outputs start as NaN, and so do the parts of pages that hold no key.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import reference
from asl_kernels.window_scores import triton as kernels
from asl_kernels.window_scores.triton import launch
from asl_vllm_testing.key_caches import LAYOUTS, fill, key_cache, kv_cache
from asl_vllm_testing.window_scores import error, row_lse
from tests.triton.device import DEVICE, INTERPRETED, TOLERANCES, on_device, untouched

pytestmark = pytest.mark.usefixtures("poison")

KERNEL = 7
# M = W + 1, a block of keys and a bit, several splits of them.
LENGTHS = (33, 70, 200, 64)

# window, heads, kv_heads, dim, block_size, dtype
SHAPES = [
    (32, 4, 2, 64, 16, torch.bfloat16),
    (32, 4, 2, 64, 16, torch.float16),
    (32, 4, 2, 64, 16, torch.float32),
    (7, 6, 1, 80, 32, torch.bfloat16),  # padded rows and head size
    (32, 5, 1, 96, 128, torch.float16),  # padded blocks of rows; pages above a tile
    (1, 1, 1, 16, 1, torch.float32),
    (9, 1, 1, 256, 24, torch.bfloat16),  # pages that are no power of two
]


def requests(
    window: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of each request."""
    generator = torch.Generator().manual_seed(dim)
    queries = [torch.randn(window, heads, dim, generator=generator) for _ in LENGTHS]
    keys = [torch.randn(n, kv_heads, dim, generator=generator) for n in LENGTHS]
    return [q.to(dtype) for q in queries], [k.to(dtype) for k in keys]


def in_pages(
    keys: list[Tensor], layout: str, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's KV cache that holds the keys, the keys in it, and the block table."""
    _, kv_heads, dim = keys[0].shape
    cache = kv_cache(
        layout,
        layers=2,
        layer=1,
        blocks=2 + sum(-(-len(rows) // block_size) for rows in keys),
        kv_heads=kv_heads,
        block_size=block_size,
        content=dim + 8,
        dtype=keys[0].dtype,
    )
    rows = key_cache(cache, dim)
    table = fill(rows, keys, torch.Generator().manual_seed(1))
    return cache, rows, table


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
def test_matches_reference(shape: tuple[Any, ...], with_lse: bool) -> None:
    window, heads, kv_heads, dim, block_size, dtype = shape
    queries, keys = requests(window, heads, kv_heads, dim, dtype)
    scale = dim**-0.5
    q, k = torch.cat(queries), torch.cat(keys)
    lse = None
    if with_lse:
        pairs = zip(queries, keys, strict=True)
        lse = torch.cat([row_lse(*pair, scale) for pair in pairs])
    layer = torch.empty(len(k) - len(q))
    want = reference.window_scores(q, k, scale, KERNEL, lse, LENGTHS, layer)
    _, rows, table = in_pages(keys, "LBNHC", block_size)

    given = None if lse is None else lse.to(DEVICE)
    for paged in (False, True):
        got_layer = torch.empty(len(k) - len(q), device=DEVICE)
        if paged:
            got = kernels.window_scores_paged(
                on_device(q),
                on_device(rows),
                on_device(table),
                LENGTHS,
                scale,
                KERNEL,
                given,
                got_layer,
                programs=8,
            )
        else:
            got = kernels.window_scores(
                on_device(q),
                on_device(k),
                scale,
                KERNEL,
                given,
                LENGTHS,
                got_layer,
                programs=8,
            )
        assert got.shape == (kv_heads, sum(LENGTHS) - len(LENGTHS) * window)
        assert error(got.cpu(), want) < TOLERANCES[dtype]
        assert error(got_layer.cpu(), layer) < TOLERANCES[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_cache(layout: str) -> None:
    queries, keys = requests(32, 4, 2, 64, torch.bfloat16)
    cache, rows, table = in_pages(keys, layout, 16)
    before = cache.view(torch.int16).clone(), table.clone()
    q = torch.cat(queries)
    want = reference.window_scores(q, torch.cat(keys), 0.125, KERNEL, None, LENGTHS)
    got = kernels.window_scores_paged(
        on_device(q),
        on_device(rows),
        on_device(table),
        LENGTHS,
        0.125,
        KERNEL,
        programs=8,
    )
    assert error(got.cpu(), want) < TOLERANCES[torch.bfloat16]
    assert torch.equal(cache.view(torch.int16), before[0])
    assert torch.equal(table, before[1])


def test_a_request_alone_in_pages() -> None:
    queries, keys = requests(7, 4, 1, 64, torch.float32)
    _, rows, table = in_pages(keys[2:3], "LBHNC", 16)
    want = reference.window_scores(queries[2], keys[2], 0.125, KERNEL)
    got = kernels.window_scores_paged(
        on_device(queries[2]),
        on_device(rows),
        on_device(table),
        LENGTHS[2:3],
        0.125,
        KERNEL,
        programs=3,
    )
    assert error(got.cpu(), want) < TOLERANCES[torch.float32]


def test_only_the_outputs_are_written() -> None:
    queries, keys = requests(7, 4, 2, 32, torch.float32)
    q, k = torch.cat(queries).to(DEVICE), torch.cat(keys).to(DEVICE)
    columns = len(k) - len(q)
    room = torch.empty(4, columns + 10, device=DEVICE)
    layer = torch.empty(columns + 10, device=DEVICE)
    out = room[1:3, 5:-5]
    kernels.window_scores(
        q, k, 0.2, KERNEL, None, LENGTHS, layer[5:-5], programs=8, out=out
    )
    assert out.isfinite().all() and layer[5:-5].isfinite().all()
    assert room[0].isnan().all() and room[3].isnan().all()
    assert room[:, :5].isnan().all() and room[:, -5:].isnan().all()
    assert layer[:5].isnan().all() and layer[-5:].isnan().all()


def test_pages_beyond_32_bits() -> None:
    block_size, stride = 16, 1 << 28
    queries, keys = requests(7, 2, 1, 16, torch.float16)
    room = untouched(10 * stride, torch.float16)
    rows = room.as_strided((10, block_size, 1, 16), (stride, 16, 16, 1))
    assert 9 * stride > 1 << 31
    table = torch.tensor([[9, 1, 8, 2, 7]], dtype=torch.int32)
    for column, part in enumerate(keys[1].split(block_size)):
        rows[int(table[0, column]), : len(part)] = part.to(DEVICE)
    got = kernels.window_scores_paged(
        on_device(queries[1]),
        rows,
        on_device(table),
        (LENGTHS[1],),
        0.25,
        KERNEL,
        programs=4,
    )
    want = reference.window_scores(queries[1], keys[1], 0.25, KERNEL)
    assert error(got.cpu(), want) < TOLERANCES[torch.float16]


def test_a_million_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, window, dim = (1 << 20) + 5, 3, 16
    if INTERPRETED:
        # In few steps; a GPU needs its own tiles.
        def large(*args: Any, **kwargs: Any) -> tuple[dict[str, int], dict[str, int]]:
            blocks = {"BLOCK_DIM": 16, "BLOCK_ROWS": 8, "BLOCK_KEYS": 1 << 16}
            return blocks, {}

        monkeypatch.setattr(launch, "block_sizes", large)
        monkeypatch.setattr(launch, "AVERAGE_BLOCK", 1 << 16)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(window, 2, dim, generator=generator)
    k = torch.randn(tokens, 1, dim, generator=generator)
    want = reference.window_scores(q, k, 0.25, KERNEL)
    got = kernels.window_scores(
        on_device(q), on_device(k), 0.25, KERNEL, programs=3 if INTERPRETED else None
    )
    # Sums of a million weights, in another order than the reference's.
    assert error(got.cpu(), want) < 1e-5
