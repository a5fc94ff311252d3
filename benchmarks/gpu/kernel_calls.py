"""Calls every kernel once and compares it with its reference.

``python -m benchmarks.gpu.kernel_calls`` is what a sanitizer watches. Sizes are no
multiples of anything, so that programs reach over the ends of what they work on.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import asl_kernels.attention_at as attention
import asl_kernels.block_table_view as view
import asl_kernels.gather_kept as gather
import asl_kernels.rank_variance as variance
import asl_kernels.window_scores as window

TOKENS, WINDOW, HEADS, KV_HEADS, DIM, POOL, PAGE = 333, 9, 6, 2, 80, 7, 16
LENGTHS = (111, 222)
KEPT = 37
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Of scores, relative to the greatest: both sides add in fp32, in different orders."""
ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of attention: both sides round to the dtype, of numbers up to about four."""


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Raises an AssertionError where they differ by more than the dtype's tolerance."""
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= TOLERANCE[dtype], f"off by {error}"


def scores(device: torch.device, dtype: torch.dtype) -> None:
    """Window scores of one request, and of several."""
    q = torch.randn(WINDOW, HEADS, DIM, device=device).to(dtype)
    k = torch.randn(TOKENS, KV_HEADS, DIM, device=device).to(dtype)
    scale = DIM**-0.5
    layer = torch.empty(TOKENS - WINDOW, device=device)
    got = window.window_scores(q, k, scale=scale, pool_kernel=POOL, layer_score=layer)
    want = window.reference.window_scores(q, k, scale, POOL)
    close(got, want, dtype)
    close(layer, want.sum(0), dtype)
    several = torch.randn(len(LENGTHS) * WINDOW, HEADS, DIM, device=device).to(dtype)
    got = window.window_scores(
        several, k, scale=scale, pool_kernel=POOL, lengths=LENGTHS
    )
    want = window.reference.window_scores(several, k, scale, POOL, LENGTHS)
    close(got, want, dtype)


def attending(device: torch.device, dtype: torch.dtype) -> None:
    """Attention at positions: without a window, and with window, cap and sinks."""
    n = KEPT
    query = torch.randn(n, HEADS, DIM, device=device).to(dtype)
    keys, values = torch.randn(2, TOKENS, KV_HEADS, DIM, device=device).to(dtype)
    places = torch.arange(TOKENS, device=device) * 2
    picked = torch.randperm(2 * TOKENS, device=device)[:n].sort().values
    sinks = torch.randn(HEADS, device=device)
    for more in ((None, 0.0, None), (50, 20.0, sinks)):
        got, want = torch.empty(2, *query.shape, device=device, dtype=dtype)
        given = (query, keys, values, picked, places)
        window, soft_cap, sink = more
        attention.attention_at(
            *given,
            scale=DIM**-0.5,
            out=got,
            window=window,
            soft_cap=soft_cap,
            sinks=sink,
        )
        attention.reference.attention_at(*given, DIM**-0.5, want, *more)
        error = (got.float() - want.float()).abs().max().item()
        assert error <= ATTENTION_TOLERANCE[dtype], f"off by {error}"


def others(device: torch.device) -> None:
    """Ranks, gathering and the block-table view, whose results are exact or nearly."""
    ranks = torch.stack([torch.randperm(TOKENS, device=device) + 1 for _ in range(5)])
    got = variance.rank_variance(ranks, KEPT)
    want = variance.reference.rank_variance(ranks, KEPT)
    assert abs(got.item() / want.item() - 1) < 1e-6
    k, v = torch.randn(2, TOKENS, KV_HEADS, DIM, device=device).bfloat16()
    picked = [torch.randperm(TOKENS, device=device)[:KEPT] for _ in range(KV_HEADS)]
    kept = torch.stack(picked).sort(dim=1).values
    for taken, rows in zip(gather.gather_kept(k, v, kept), (k, v), strict=True):
        assert torch.equal(taken, gather.reference.gather_rows(rows, kept))
    hidden = k.flatten(1)
    taken = gather.gather_tokens(hidden, kept[0])
    assert torch.equal(taken, hidden[kept[0]])
    table = torch.randint(1, 99, (5, 77), dtype=torch.int32, device=device)
    table[1, :30], table[3] = 0, 0
    lens = torch.full((5,), 77 * PAGE - 3, dtype=torch.int32, device=device)
    outs = [(torch.empty_like(table), torch.empty_like(lens)) for _ in range(2)]
    view.block_table_view(table, lens, PAGE, out_table=outs[0][0], out_lens=outs[0][1])
    view.reference.block_table_view(table, lens, PAGE, *outs[1])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        scores(device, dtype)
        attending(device, dtype)
    others(device)
    print("all kernels equal their references")


if __name__ == "__main__":
    main()
