"""Where queries and keys lie, for sizes that no test could allocate."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from asl_kernels.window_scores.triton.loading import key_offsets, query_offsets
from tests.triton.device import DEVICE

COUNT = 16
STRIDES = (1 << 13, 1 << 8)
"""Of tokens and heads: 32 KV heads of 256 elements."""


@triton.jit
def offsets_kernel(
    p_keys,
    p_out,
    p_request,
    p_first,
    p_head,
    stride_token,
    stride_head,
    QUERIES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Stores what the kernels' address arithmetic makes of each row."""
    o_rows = tl.arange(0, COUNT)
    i_request = tl.load(p_request)
    i_head = tl.load(p_head)
    if QUERIES:
        o_all = query_offsets(
            i_request, i_head, o_rows, stride_token, stride_head, 64, 16
        )
    else:
        o_all = key_offsets(
            tl.load(p_first),
            i_head,
            tl.load(p_keys + o_rows),
            stride_token,
            stride_head,
        )
    tl.store(p_out + o_rows, o_all)


def offsets(
    keys: Tensor,
    request: int,
    first: int,
    head: int,
    *,
    queries: bool = False,
) -> list[int]:
    """The offsets of ``keys`` (int32) of a request and head."""

    def scalar(value: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=DEVICE)

    out = torch.full((COUNT,), -1, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](
        keys.to(DEVICE),
        out,
        scalar(request, torch.int32),
        scalar(first, torch.int64),
        scalar(head, torch.int32),
        *STRIDES,
        QUERIES=queries,
        COUNT=COUNT,
    )
    return out.tolist()


# Wrapping around would be a warning of numpy's, and another offset.
pytestmark = pytest.mark.filterwarnings("error:overflow encountered:RuntimeWarning")


def test_a_million_packed_keys_of_each_of_many_requests() -> None:
    keys = torch.arange(COUNT, dtype=torch.int32) + (1 << 20) - COUNT
    token, head = STRIDES
    for first in (0, 1 << 20, 63 << 20, (1 << 31) + 5):
        got = offsets(keys, 3, first, 31)
        want = [(first + key) * token + 31 * head for key in keys.tolist()]
        assert got == want
        assert want[0] > 1 << 31


def test_queries_of_many_requests_and_heads() -> None:
    got = offsets(
        torch.zeros(COUNT, dtype=torch.int32), 1 << 20, 0, 1 << 20, queries=True
    )
    token, head = STRIDES
    assert got == [
        ((1 << 20) * 64 + row // 16) * token + ((1 << 20) * 16 + row % 16) * head
        for row in range(COUNT)
    ]
