"""What only a GPU can show: no wait for the device, and capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from asl_kernels.attention_at import attention_at
from asl_kernels.block_table_view import block_table_view, reference
from asl_kernels.gather_kept import gather_kept, gather_tokens
from asl_kernels.rank_variance import descending_ranks, rank_variance
from asl_kernels.window_scores import window_scores
from tests.triton.device import DEVICE, INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
def test_no_operation_waits_for_the_device() -> None:
    q = torch.randn(64, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(400, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    table = torch.arange(26, dtype=torch.int32, device=DEVICE).view(2, 13)
    lens = torch.tensor([100, 200], dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(table), torch.empty_like(lens)
    kept = torch.arange(20, device=DEVICE).repeat(2, 1)
    # Once to compile, once to see.
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        scores = window_scores(q, k, scale=0.125, pool_kernel=7, lengths=(150, 250))
        window_scores(q, k, scale=0.125, pool_kernel=7)
        rank_variance(torch.stack([descending_ranks(row) for row in scores]), 20)
        gather_kept(k, k, kept)
        gather_tokens(k[:, 0], kept[0])
        at = torch.arange(400, device=DEVICE)
        attention_at(q, k, k, at[:64], at, scale=0.1, out=q.clone(), window=9)
        block_table_view(table, lens, 16, out_table=out[0], out_lens=out[1])


def test_the_view_is_captured_in_a_graph() -> None:
    table = torch.arange(26, dtype=torch.int32, device=DEVICE).view(2, 13)
    lens = torch.tensor([100, 200], dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(table), torch.empty_like(lens)
    block_table_view(table, lens, 16, out_table=out[0], out_lens=out[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_table_view(table, lens, 16, out_table=out[0], out_lens=out[1])
    # Other rows, and one that is padding, without another capture.
    table[0, :5], table[1] = 0, 0
    graph.replay()
    want = torch.empty_like(table), torch.empty_like(lens)
    reference.block_table_view(table, lens, 16, *want)
    assert torch.equal(out[0], want[0])
    assert torch.equal(out[1], want[1])
