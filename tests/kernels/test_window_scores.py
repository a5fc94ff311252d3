"""Window scores against a naive double-precision loop, and its closed forms."""

from __future__ import annotations

import pytest
import torch

from asl_kernels.window_scores import window_scores
from asl_vllm_testing.window_scores import TOLERANCES, error, naive


@pytest.mark.parametrize(
    ("tokens", "window", "heads", "kv_heads", "dim", "pool_kernel"),
    [
        (9, 8, 4, 2, 16, 7),  # M = W + 1: one score
        (2, 1, 1, 1, 16, 1),
        (2, 1, 2, 1, 256, 63),
        (10, 8, 16, 1, 16, 7),  # GQA 16; prefix narrower than the pooling
        (64, 32, 8, 8, 64, 7),  # GQA 1
        (65, 32, 8, 2, 80, 7),
        (131, 64, 6, 2, 128, 5),
        (257, 33, 5, 5, 256, 3),
        (200, 7, 12, 4, 96, 1),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_matches_naive(
    tokens: int,
    window: int,
    heads: int,
    kv_heads: int,
    dim: int,
    pool_kernel: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(window, heads, dim, generator=generator)
    k = torch.randn(tokens, kv_heads, dim, generator=generator)
    scale = dim**-0.5
    got = window_scores(q.to(dtype), k.to(dtype), scale=scale, pool_kernel=pool_kernel)
    assert got.shape == (kv_heads, tokens - window)
    assert got.dtype == torch.float32
    rounded, unrounded = TOLERANCES[dtype]
    assert error(got, naive(q.to(dtype), k.to(dtype), scale, pool_kernel)) < rounded
    assert error(got, naive(q, k, scale, pool_kernel)) < unrounded


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_weighted_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 6, 64, generator=generator).to(dtype)
    k = torch.randn(70, 2, 64, generator=generator).to(dtype)
    weights = torch.rand(9, generator=generator).clamp(min=0.1)
    want = naive(q, k, 0.125, 5, weights)
    options = {"scale": 0.125, "pool_kernel": 5}
    assert error(window_scores(q, k, row_weights=weights, **options), want) < 3e-6
    ones = window_scores(q, k, row_weights=torch.ones(9), **options)
    assert torch.equal(ones, window_scores(q, k, **options))
    assert error(ones, want) > 0.1


@pytest.mark.parametrize("reach", [2, 5, 64, 200])
def test_scores_reach_forward(reach: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 6, 64, generator=generator)
    k = torch.randn(130, 2, 64, generator=generator)
    want = naive(q, k, 0.125, 3, reach=reach)
    got = window_scores(q, k, scale=0.125, pool_kernel=3, reach=reach)
    assert error(got, want) < 3e-6
    assert error(window_scores(q, k, scale=0.125, pool_kernel=3), want) > 0.1


def test_a_peak_is_followed_by_what_it_reaches() -> None:
    k = torch.zeros(24, 1, 16)
    k[5] = 1
    got = window_scores(torch.ones(4, 2, 16), k, scale=1.0, pool_kernel=1, reach=3)[0]
    assert (got > 1).nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_strided_keys_score_the_same(dtype: torch.dtype) -> None:
    q = torch.randn(8, 3, 4, 64)[:, 1].to(dtype)
    packed = torch.randn(100, 2, 2, 64).to(dtype)  # K and V of a head side by side
    strided = packed[:, :, 0]
    by_head = packed[:, :, 0].transpose(0, 1).contiguous().transpose(0, 1)
    want = window_scores(q, strided.contiguous(), scale=0.125, pool_kernel=7)
    for k in (strided, by_head):
        assert not k.is_contiguous()
        torch.testing.assert_close(
            window_scores(q, k, scale=0.125, pool_kernel=7), want, rtol=2e-6, atol=0
        )


def test_equal_keys_get_equal_shares() -> None:
    window, heads, prefix = 4, 6, 12
    q = torch.randn(window, heads, 16)
    k = torch.ones(prefix + window, 2, 16)
    share = sum(1 / (prefix + row + 1) for row in range(window)) * heads / 2
    got = window_scores(q, k, scale=1.0, pool_kernel=1)
    torch.testing.assert_close(got, torch.full((2, prefix), share))


def test_padding_is_counted() -> None:
    q, k = torch.randn(4, 2, 16), torch.ones(24, 1, 16)
    flat = window_scores(q, k, scale=1.0, pool_kernel=1)[0, 0]
    pooled = window_scores(q, k, scale=1.0, pool_kernel=5)[0]
    shares = torch.full((20,), 1.0)
    shares[0] = shares[-1] = 3 / 5
    shares[1] = shares[-2] = 4 / 5
    torch.testing.assert_close(pooled, shares * flat)


def test_large_logits_stay_finite() -> None:
    q, k = torch.full((4, 2, 16), 1e4), torch.randn(20, 2, 16) * 1e4
    assert window_scores(q, k, scale=0.25, pool_kernel=3).isfinite().all()


def test_keys_at_minus_infinity_get_nothing() -> None:
    q, k = torch.rand(4, 2, 16) + 0.1, torch.randn(20, 1, 16)
    want = window_scores(q, k[8:], scale=0.25, pool_kernel=1)
    k[:8, 0, 3] = float("-inf")
    got = window_scores(q, k, scale=0.25, pool_kernel=1)
    assert (got[:, :8] == 0).all()
    torch.testing.assert_close(got[:, 8:], want)


def test_arguments_are_left_alone() -> None:
    q, k = torch.randn(4, 2, 16), torch.randn(20, 2, 16)
    before = q.clone(), k.clone()
    window_scores(q, k, scale=0.25, pool_kernel=3)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "pool_kernel", "message"),
    [
        ((4, 2), (9, 2, 16), 7, r"q: got shape \(4, 2\); wanted \[n \* W, H, D\]"),
        ((4, 2, 16), (9, 2, 8), 7, r"k: got shape \(9, 2, 8\); wanted .*any, any, 16"),
        ((4, 2, 16), (4, 2, 16), 7, r"got M = 4 tokens; wanted more than W = 4"),
        ((4, 3, 16), (9, 2, 16), 7, r"q: got H = 3; wanted a multiple of Hkv = 2"),
        ((4, 2, 16), (9, 0, 16), 7, r"no size may be 0"),
        ((0, 2, 16), (9, 2, 16), 7, r"no size may be 0"),
        ((4, 2, 16), (9, 2, 16), 6, r"pool_kernel: got 6; allowed: odd"),
        ((4, 2, 16), (9, 2, 16), -1, r"pool_kernel: got -1"),
    ],
)
def test_bad_arguments(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], pool_kernel: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        window_scores(
            torch.ones(q_shape), torch.ones(k_shape), scale=1.0, pool_kernel=pool_kernel
        )


def test_bad_row_weights() -> None:
    q, k = torch.ones(4, 2, 16), torch.ones(9, 2, 16)
    for weights, message in (
        (torch.ones(3), r"row_weights: got shape \(3,\); wanted \[W\] = \(4\)"),
        (
            torch.ones(4).half(),
            r"row_weights: got torch\.float16; allowed: torch\.flo",
        ),
        (torch.ones(4, device="meta"), r"row_weights: on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            window_scores(q, k, scale=1.0, pool_kernel=7, row_weights=weights)


def test_bad_dtype_stride_and_device() -> None:
    q, k = torch.ones(4, 2, 16), torch.ones(9, 2, 16)
    with pytest.raises(ValueError, match=r"k: got torch\.float64; allowed: torch\.flo"):
        window_scores(q, k.double(), scale=1.0, pool_kernel=7)
    with pytest.raises(ValueError, match=r"q: got torch\.int64"):
        window_scores(q.long(), k, scale=1.0, pool_kernel=7)
    with pytest.raises(ValueError, match=r"k: the last dimension has stride 9"):
        window_scores(q, torch.ones(2, 16, 9).permute(2, 0, 1), scale=1, pool_kernel=7)
    with pytest.raises(ValueError, match=r"k: on meta, the other arguments on cpu"):
        window_scores(q, k.to("meta"), scale=1.0, pool_kernel=7)
    with pytest.raises(ValueError, match="reach: got 0; allowed: at least 1"):
        window_scores(q, k, scale=1.0, pool_kernel=7, reach=0)
