"""Window scores in Triton's interpreter against the reference.

Workspaces and outputs start as NaN: what a kernel reads before it is written shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import reference
from asl_kernels.window_scores import triton as kernels
from asl_vllm_testing.window_scores import error, naive
from tests.triton.device import DEVICE, TOLERANCES, on_device, untouched

pytestmark = pytest.mark.usefixtures("poison")

FP32 = TOLERANCES[torch.float32]

# tokens, window, heads, kv_heads, dim, pool_kernel, programs
SHAPES = [
    (2, 1, 1, 1, 32, 1, 1),  # M = W + 1: one score
    (33, 32, 3, 1, 64, 7, 8),  # the same, of the usual window
    (65, 32, 4, 4, 32, 7, 8),  # M = a block of keys + 1
    (150, 7, 6, 2, 80, 5, 6),  # padded rows and head size
    (300, 32, 4, 1, 128, 7, 3),  # splits of several blocks
    (135, 64, 3, 1, 96, 7, 6),  # several blocks of rows, the last one padded
    (100, 9, 16, 1, 32, 7, 6),  # the same, and a split of one block
    (150, 32, 4, 1, 256, 5, 9),  # the window lies in two splits
    (40, 4, 2, 1, 320, 3, 2),  # heads that are read in parts
]


def score(
    q: Tensor, k: Tensor, scale: float, pool_kernel: int, programs: int, reach: int = 1
) -> Tensor:
    """The kernels' scores, back on the CPU."""
    arguments = on_device(q), on_device(k), scale, pool_kernel
    return kernels.window_scores(*arguments, reach=reach, programs=programs).cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, window, heads, kv_heads, dim, pool_kernel, programs = shape
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(window, heads, dim, generator=generator).to(dtype)
    k = torch.randn(tokens, kv_heads, dim, generator=generator).to(dtype)
    scale = dim**-0.5
    want = reference.window_scores(q, k, scale, pool_kernel)
    got = score(q, k, scale, pool_kernel, programs=programs)
    assert got.shape == (kv_heads, tokens - window)
    assert got.dtype == torch.float32
    assert error(got, want) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], SHAPES[6]], ids=str)
def test_weighted_rows(shape: tuple[int, ...]) -> None:
    tokens, window, heads, kv_heads, dim, pool_kernel, programs = shape
    q, k = torch.randn(window, heads, dim), torch.randn(tokens, kv_heads, dim)
    scale = dim**-0.5
    weights = torch.rand(window).clamp(min=0.1)
    arguments = q, k, scale, pool_kernel, None, None, weights
    want = reference.window_scores(*arguments)
    there = [on_device(x) if isinstance(x, Tensor) else x for x in arguments]
    got = kernels.window_scores(*there, programs=programs).cpu()
    assert error(got, want) < TOLERANCES[torch.float32]
    assert error(got, reference.window_scores(*arguments[:4])) > 0.05


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    # Integers, so that logits are exact: of about 1e4, with differences of 0 to 4.
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-30, 31, (8, 4, 64), generator=generator).to(dtype)
    k = torch.randint(-30, 31, (1, 2, 64), generator=generator).to(dtype)
    k = k.repeat(120, 1, 1)
    q[..., 0] = 1
    k[..., 0] = torch.randint(-2, 3, (120, 2), generator=generator).to(dtype)
    for scale in (1.0, -1.0):
        want = naive(q, k, scale, 5)
        got = score(q, k, scale, 5, programs=4)
        assert error(got, want) < TOLERANCES[dtype]


@pytest.mark.filterwarnings("error:overflow encountered:RuntimeWarning")
def test_huge_logits_stay_finite() -> None:
    # Of 1e9, with rounding errors of 100: which key wins is left to chance, no more.
    q = torch.randn(4, 2, 16) * 1e4
    k = torch.randn(1, 2, 16).repeat(100, 1, 1) * 1e4
    got = score(q, k, 0.25, 1, programs=4)
    assert got.isfinite().all()
    assert got.min() >= 0 and got.max() <= 4  # rows


@pytest.mark.parametrize("scale", [0, 1])
def test_scale_may_be_an_int(scale: int) -> None:
    q, k = torch.randn(4, 2, 16), torch.randn(100, 2, 16)
    got = score(q, k, scale, 3, programs=4)
    assert error(got, reference.window_scores(q, k, scale, 3)) < FP32


def test_mixed_dtypes() -> None:
    q, k = torch.randn(4, 2, 16), torch.randn(100, 2, 16).bfloat16()
    got = score(q, k, 0.25, 3, programs=4)
    assert error(got, reference.window_scores(q, k, 0.25, 3)) < FP32


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_strided_arguments(dtype: torch.dtype) -> None:
    q = torch.randn(8, 3, 4, 64).to(dtype)[:, 1]
    packed = torch.randn(100, 2, 2, 64).to(dtype)  # K and V of a head side by side
    strided = packed[:, :, 0]
    by_head = packed[:, :, 0].transpose(0, 1).contiguous().transpose(0, 1)
    want = reference.window_scores(q.contiguous(), strided.contiguous(), 0.125, 7)
    assert not q.is_contiguous()
    for k in (strided, by_head):
        assert not k.is_contiguous()
        got = score(q, k, 0.125, 7, programs=6)
        assert error(got, want) < TOLERANCES[dtype]


def test_addresses_beyond_32_bits() -> None:
    tokens, stride = 150, 1 << 24
    room = untouched(tokens * stride, torch.float16)
    k = room.as_strided((tokens, 1, 16), (stride, 16, 1))
    k.copy_(torch.randn(tokens, 1, 16))
    assert tokens * stride > 1 << 31
    q = torch.randn(4, 2, 16).half()
    got = kernels.window_scores(on_device(q), k, 0.25, 7, programs=4)
    want = reference.window_scores(q, k.cpu().contiguous(), 0.25, 7)
    assert error(got.cpu(), want) < TOLERANCES[torch.float16]


def test_only_the_output_is_written() -> None:
    q, k = torch.randn(4, 2, 16), torch.randn(100, 2, 16)
    given = [on_device(tensor) for tensor in (q, k)]
    before = [tensor.clone() for tensor in given]
    room = torch.empty(4, 96 + 10, device=DEVICE)
    out = room[1:3, 5:-5]
    assert kernels.window_scores(*given, 0.25, 3, programs=4, out=out) is out
    assert error(out.cpu(), reference.window_scores(q, k, 0.25, 3)) < FP32
    assert room[0].isnan().all() and room[3].isnan().all()
    assert room[:, :5].isnan().all() and room[:, -5:].isnan().all()
    for left, right in zip(given, before, strict=True):
        assert torch.equal(left, right)


def test_ties_score_alike() -> None:
    # Three keys in turn, so that each scores as every third does, inside the ends.
    q, k = torch.randn(8, 4, 64), torch.randn(3, 2, 64).repeat(50, 1, 1)
    got = score(q, k, 0.125, 1, programs=4)
    assert error(got, reference.window_scores(q, k, 0.125, 1)) < FP32
    assert error(got[:, 3:], got[:, :-3].double()) < FP32


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_keys_at_minus_infinity_get_nothing(dtype: torch.dtype) -> None:
    q, k = (torch.rand(4, 2, 16) + 0.1).to(dtype), torch.randn(150, 1, 16).to(dtype)
    k[:70, 0, 3] = float("-inf")  # a whole block of keys, and a bit
    got = score(q, k, 0.25, 1, programs=4)
    assert (got[:, :70] == 0).all()
    assert error(got, reference.window_scores(q, k, 0.25, 1)) < TOLERANCES[dtype]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [(0, 70), (130, 131)])
def test_queries_and_keys_that_overflow_show(
    value: float, rows: tuple[int, int]
) -> None:
    # In W * G = 8 and 16 rows: with rows of padding, and without.
    for window in (4, 8):
        q, k = torch.rand(window, 2, 16) + 0.1, torch.randn(150, 1, 16)
        k[slice(*rows), 0, 3] = value
        assert not reference.window_scores(q, k, 0.25, 1).isfinite().any()
        assert not score(q, k, 0.25, 1, programs=4).isfinite().any()
        assert not score(q, k, 0.25, 1, programs=4, reach=3).isfinite().any()
