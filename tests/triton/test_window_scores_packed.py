"""Window scores of several requests at once, against the reference.

Workspaces and outputs start as NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import reference
from asl_kernels.window_scores import triton as kernels
from asl_kernels.window_scores.triton import launch
from asl_vllm_testing.window_scores import error
from tests.triton.device import DEVICE, INTERPRETED, TOLERANCES, on_device

pytestmark = pytest.mark.usefixtures("poison")

KERNEL = 7
REACH = 33
# M = W + 1, a block of keys and a bit, several splits of them.
LENGTHS = (33, 70, 200, 64)

# window, heads, kv_heads, dim, dtype
SHAPES = [
    (32, 4, 2, 64, torch.bfloat16),
    (32, 4, 2, 64, torch.float16),
    (32, 4, 2, 64, torch.float32),
    (7, 6, 1, 80, torch.bfloat16),  # padded rows and head size
    (32, 5, 1, 96, torch.float16),  # padded blocks of rows
    (1, 1, 1, 16, torch.float32),
    (9, 1, 1, 256, torch.bfloat16),
]


def requests(
    window: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of each request."""
    generator = torch.Generator().manual_seed(dim)
    queries = [torch.randn(window, heads, dim, generator=generator) for _ in LENGTHS]
    keys = [torch.randn(n, kv_heads, dim, generator=generator) for n in LENGTHS]
    return [q.to(dtype) for q in queries], [k.to(dtype) for k in keys]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple[Any, ...]) -> None:
    window, heads, kv_heads, dim, dtype = shape
    queries, keys = requests(window, heads, kv_heads, dim, dtype)
    scale = dim**-0.5
    q, k = torch.cat(queries), torch.cat(keys)
    layer = torch.empty(len(k) - len(q))
    want = reference.window_scores(q, k, scale, KERNEL, LENGTHS, layer, reach=REACH)
    got_layer = torch.empty(len(k) - len(q), device=DEVICE)
    got = kernels.window_scores(
        on_device(q),
        on_device(k),
        scale,
        KERNEL,
        LENGTHS,
        got_layer,
        reach=REACH,
        programs=8,
    )
    assert got.shape == (kv_heads, sum(LENGTHS) - len(LENGTHS) * window)
    assert error(got.cpu(), want) < TOLERANCES[dtype]
    assert error(got_layer.cpu(), layer) < TOLERANCES[dtype]


def test_only_the_outputs_are_written() -> None:
    queries, keys = requests(7, 4, 2, 32, torch.float32)
    q, k = torch.cat(queries).to(DEVICE), torch.cat(keys).to(DEVICE)
    columns = len(k) - len(q)
    room = torch.empty(4, columns + 10, device=DEVICE)
    layer = torch.empty(columns + 10, device=DEVICE)
    out = room[1:3, 5:-5]
    options = {"reach": REACH, "programs": 8, "out": out}
    kernels.window_scores(q, k, 0.2, KERNEL, LENGTHS, layer[5:-5], **options)
    assert out.isfinite().all() and layer[5:-5].isfinite().all()
    assert room[0].isnan().all() and room[3].isnan().all()
    assert room[:, :5].isnan().all() and room[:, -5:].isnan().all()
    assert layer[:5].isnan().all() and layer[-5:].isnan().all()


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
