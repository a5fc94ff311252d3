"""Window scores of several requests at once, through the wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm_testing.window_scores import TOLERANCES, error, naive

WINDOW, HEADS, KV_HEADS, DIM = 8, 6, 2, 48
SCALE = DIM**-0.5
# M = W + 1, and several.
LENGTHS = (9, 32, 17, 101)


def requests(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of each request."""
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(WINDOW, HEADS, DIM, generator=generator) for _ in LENGTHS]
    keys = [torch.randn(n, KV_HEADS, DIM, generator=generator) for n in LENGTHS]
    return [q.to(dtype) for q in queries], [k.to(dtype) for k in keys]


@pytest.mark.parametrize("reach", [1, 20])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_packed_requests_score_as_alone(dtype: torch.dtype, reach: int) -> None:
    queries, keys = requests(dtype)
    got = window_scores(
        torch.cat(queries),
        torch.cat(keys),
        scale=SCALE,
        pool_kernel=7,
        lengths=LENGTHS,
        reach=reach,
    )
    parts = got.split([n - WINDOW for n in LENGTHS], dim=1)
    for q, k, part in zip(queries, keys, parts, strict=True):
        assert error(part, naive(q, k, SCALE, 7, reach=reach)) < TOLERANCES[dtype][0]


@pytest.mark.parametrize("reach", [1, 20])
def test_layer_score_is_the_sum_over_kv_heads(reach: int) -> None:
    queries, keys = requests(torch.float32)
    q, k = torch.cat(queries), torch.cat(keys)
    options = {"scale": SCALE, "pool_kernel": 3, "reach": reach}
    layer = torch.full((sum(LENGTHS) - len(q),), float("nan"))
    scores = window_scores(q, k, lengths=LENGTHS, layer_score=layer, **options)
    assert torch.equal(layer, scores.sum(0))


def arguments(**changed: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "q": torch.ones(8, 2, 16),
        "k": torch.ones(17, 1, 16),
        "lengths": (5, 12),
        "scale": 1.0,
        "pool_kernel": 7,
    }
    return good | changed


def test_these_arguments_are_good() -> None:
    assert window_scores(**arguments()).shape == (1, 9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.ones(9, 2, 16)}, r"got 2 requests; wanted a divisor of q's 9 row"),
        ({"lengths": (5, 13)}, r"lengths: got 18 tokens in all; k has 17"),
        ({"lengths": (4, 13)}, r"k: got M = 4 tokens; wanted more than W = 4"),
        (
            {"k": torch.ones(0, 1, 16), "lengths": ()},
            r"lengths: got 0 requests; wanted a divisor of q's 8 rows",
        ),
        ({"layer_score": torch.ones(8)}, r"layer_score: got shape \(8,\); wanted .*9"),
        ({"layer_score": torch.ones(9).double()}, r"layer_score: got torch\.float64"),
        ({"layer_score": torch.ones(9, 2)[:, 0]}, r"layer_score: the last dimension"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_scores(**arguments(**changed))
