"""What `benchmarks.kernels` measures: operations of asl_kernels on made-up inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import asl_kernels.attention_at as attention
import asl_kernels.block_table_view as view
import asl_kernels.gather_kept as gather
import asl_kernels.rank_variance as variance
import asl_kernels.window_scores as window
from asl_vllm.selection.kept import best_and_tail

WINDOW, POOL = 32, 7
KV_HEADS, GROUP, DIM = 8, 4, 128
SCALE = DIM**-0.5
HIDDEN = 4096
LAYERS = 8
"""Layers whose ranks a check compares."""
BLOCK_SIZE = 16
BUDGET = 1024
"""Tokens that stay."""
REQUESTS = 4
"""Prompts that are scored at once, of an eighth to a half of all tokens."""


@dataclass(frozen=True)
class Case:
    """An operation on inputs of one size."""

    what: str
    size: str
    run: Callable[[], Any]
    reference: Callable[[], Any]
    num_bytes: int
    """That must be moved: each input read once, each output written once."""
    tolerance: float | None = 0.0
    """Of the result, relative to its largest element; 0: the same bits; None: the
    reference does something else."""
    wrapped: bool = True
    """Whether ``run`` is one of our wrappers, which on a CPU call the reference."""


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    """Requests in a batch."""
    copy_bytes: int
    dtype: torch.dtype


SIZES = {
    "cuda": Sizes((8192, 32768, 131072), (8, 256, 1024), 1 << 30, torch.bfloat16),
    "cpu": Sizes((2048, 4096), (8, 256), 1 << 26, torch.float32),
}


def size_in_bytes(*tensors: Tensor) -> int:
    """Memory of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scoring(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Window scores of a prompt at one layer, in the ways that there are."""
    q = torch.randn(WINDOW, KV_HEADS * GROUP, DIM, device=device).to(dtype)
    k = torch.randn(tokens, KV_HEADS, DIM, device=device).to(dtype)
    layer = torch.empty(tokens - WINDOW, device=device)
    num_bytes = size_in_bytes(q, k) + 4 * KV_HEADS * (tokens - WINDOW)

    def case(what: str, more_bytes: int = 0, **given: Any) -> Case:
        return Case(
            what,
            f"M {tokens}",
            lambda: window.window_scores(q, k, scale=SCALE, pool_kernel=POOL, **given),
            lambda: window.reference.window_scores(q, k, SCALE, POOL, **given),
            num_bytes + more_bytes,
            # Both add in fp32, in different orders.
            tolerance=1e-3,
        )

    yield case("window_scores")
    yield case("window_scores, layer score", size_in_bytes(layer), layer_score=layer)
    yield scoring_requests(k)


def scoring_requests(k: Tensor) -> Case:
    """The same keys as those of several prompts."""
    tokens = k.shape[0]
    lengths = (tokens // 2, tokens // 4, tokens // 8, tokens // 8)
    heads = KV_HEADS * GROUP
    q = torch.randn(REQUESTS * WINDOW, heads, DIM, device=k.device).to(k.dtype)
    return Case(
        f"window_scores, {REQUESTS} requests",
        f"M {tokens}",
        lambda: window.window_scores(
            q, k, scale=SCALE, pool_kernel=POOL, lengths=lengths
        ),
        lambda: window.reference.window_scores(q, k, SCALE, POOL, lengths),
        size_in_bytes(q, k) + 4 * KV_HEADS * (tokens - REQUESTS * WINDOW),
        tolerance=1e-3,
    )


def ranking(tokens: int, device: torch.device) -> Iterator[Case]:
    """Ranks of one layer's scores by torch's sort, and other ways to have them."""
    scores = torch.rand(tokens, device=device)
    places = torch.arange(tokens, device=device)

    def argsort_twice() -> Tensor:
        order = scores.flip(0).argsort(descending=True, stable=True)
        return order.argsort().flip(0) + 1

    def sort_of_unique_keys() -> Tensor:
        # Bits of floats that are not negative are in the order of their values.
        keys = (scores.view(torch.int32).long() << 32) | places
        ranks = torch.empty_like(places)
        ranks[keys.argsort(descending=True)] = places + 1
        return ranks

    def searchsorted() -> Tensor:
        ordered = scores.sort().values
        return tokens - torch.searchsorted(ordered, scores)

    def topk() -> Tensor:
        return scores.topk(BUDGET - WINDOW).indices

    used = variance.reference.descending_ranks
    num_bytes = size_in_bytes(scores) + 8 * tokens

    def case(what: str, run: Callable[[], Tensor], same: bool = True) -> Case:
        return Case(
            what,
            f"M {tokens}",
            run,
            lambda: used(scores),
            num_bytes,
            tolerance=0.0 if same else None,
            wrapped=False,
        )

    yield Case(
        "descending_ranks",
        f"M {tokens}",
        lambda: variance.descending_ranks(scores),
        lambda: used(scores),
        num_bytes,
    )
    yield case("ranks: argsort twice", argsort_twice)
    yield case("ranks: sort of unique keys", sort_of_unique_keys)
    # Equal scores get one rank there, and top-k ranks nothing: what they would save.
    yield case("(ranks: searchsorted)", searchsorted, same=False)
    yield case("(topk alone)", topk, same=False)


def comparing(tokens: int, device: torch.device) -> Case:
    """Variance of the ranks of several layers."""
    rows = [torch.randperm(tokens, device=device) + 1 for _ in range(LAYERS)]
    ranks = torch.stack(rows)
    return Case(
        "rank_variance",
        f"n {LAYERS}, M {tokens}",
        lambda: variance.rank_variance(ranks, BUDGET - WINDOW),
        lambda: variance.reference.rank_variance(ranks, BUDGET - WINDOW),
        size_in_bytes(ranks) + 8,
        tolerance=1e-6,
    )


def attending(tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Tokens selected of a cached prefix attend to it again, at one layer."""
    query = torch.randn(BUDGET, KV_HEADS * GROUP, DIM, device=device).to(dtype)
    keys, values = torch.randn(2, tokens, KV_HEADS, DIM, device=device).to(dtype)
    places = torch.arange(tokens, device=device)
    picked = torch.randperm(tokens, device=device)[:BUDGET].sort().values
    outs = [torch.empty_like(query) for _ in range(2)]

    def run() -> Tensor:
        attention.attention_at(
            query, keys, values, picked, places, scale=SCALE, out=outs[0]
        )
        return outs[0]

    def reference() -> Tensor:
        attention.reference.attention_at(
            query, keys, values, picked, places, SCALE, outs[1], None, 0.0, None
        )
        return outs[1]

    return Case(
        "attention_at",
        f"M {tokens}, n {BUDGET}",
        run,
        reference,
        size_in_bytes(query, keys, values, picked, places, outs[0]),
        # Rounded to the dtype on both sides.
        tolerance=1e-2,
    )


def gathering(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Kept keys and values of a layer, and the hidden states that go deeper."""
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, device=device).to(dtype)
    picked = [torch.randperm(tokens, device=device)[:BUDGET] for _ in range(KV_HEADS)]
    kept = torch.stack(picked).sort(dim=1).values
    out_bytes = 2 * BUDGET * KV_HEADS * DIM * k.element_size()
    yield Case(
        "gather_kept",
        f"M {tokens}, k {BUDGET}",
        lambda: gather.gather_kept(k, v, kept),
        lambda: (
            gather.reference.gather_rows(k, kept),
            gather.reference.gather_rows(v, kept),
        ),
        2 * out_bytes + size_in_bytes(kept),
    )
    hidden = torch.randn(tokens, HIDDEN, device=device).to(dtype)
    row_bytes = HIDDEN * hidden.element_size()
    yield Case(
        "gather_tokens",
        f"M {tokens}, k {BUDGET}",
        lambda: gather.gather_tokens(hidden, kept[0]),
        lambda: gather.reference.gather_tokens(hidden, kept[0]),
        2 * BUDGET * row_bytes + size_in_bytes(kept[0]),
    )


def viewing(rows: int, tokens: int, device: torch.device) -> Case:
    """A batch's block tables, of which every other row is pruned."""
    columns = tokens // BLOCK_SIZE
    table = torch.randint(1, 1 << 20, (rows, columns), dtype=torch.int32, device=device)
    table[::2, : (tokens - BUDGET) // BLOCK_SIZE] = 0
    lens = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    out_table, out_lens = torch.empty_like(table), torch.empty_like(lens)

    def run(wrapped: bool) -> tuple[Tensor, Tensor]:
        if wrapped:
            view.block_table_view(
                table, lens, BLOCK_SIZE, out_table=out_table, out_lens=out_lens
            )
        else:
            view.reference.block_table_view(
                table, lens, BLOCK_SIZE, out_table, out_lens
            )
        return out_table, out_lens

    return Case(
        "block_table_view",
        f"R {rows}, C {columns}",
        lambda: run(True),
        lambda: run(False),
        2 * size_in_bytes(table, lens),
    )


def selecting(tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """All that selection does at a layer that is checked, its host sync included."""
    q = torch.randn(WINDOW, KV_HEADS * GROUP, DIM, device=device).to(dtype)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, device=device).to(dtype)
    before = [torch.randperm(tokens - WINDOW, device=device) + 1] * (LAYERS - 1)

    def run(wrapped: bool) -> Tensor:
        of_scores: Any = window if wrapped else window.reference
        of_ranks: Any = variance if wrapped else variance.reference
        scores = of_scores.window_scores(q, k, scale=SCALE, pool_kernel=POOL)
        ranks = torch.stack([*before, of_ranks.descending_ranks(scores.sum(0))])
        of_ranks.rank_variance(ranks, BUDGET - WINDOW).item()
        kept = best_and_tail(scores, BUDGET, WINDOW)
        if wrapped:
            gather.gather_kept(k, v, kept)
        else:
            gather.reference.gather_rows(k, kept)
            gather.reference.gather_rows(v, kept)
        return scores

    kept_bytes = 2 * BUDGET * KV_HEADS * DIM * k.element_size()
    return Case(
        "a layer's selection",
        f"M {tokens}, k {BUDGET}",
        lambda: run(True),
        lambda: run(False),
        # Queries, keys, scores, ranks of all layers, and what is kept.
        size_in_bytes(q, k)
        + 4 * KV_HEADS * (tokens - WINDOW)
        + 8 * LAYERS * (tokens - WINDOW)
        + 2 * kept_bytes,
        tolerance=1e-3,
    )


def cases(device: torch.device) -> Iterator[Case]:
    """The rows of the table; the inputs of one are gone when the next is made."""
    sizes = SIZES[device.type]
    for tokens in sizes.tokens:
        yield from scoring(tokens, device, sizes.dtype)
    for tokens in sizes.tokens:
        yield from ranking(tokens, device)
    for tokens in sizes.tokens:
        yield comparing(tokens, device)
    for tokens in sizes.tokens:
        yield from gathering(tokens, device, sizes.dtype)
    for tokens in sizes.tokens:
        yield attending(tokens, device, sizes.dtype)
    for rows in sizes.rows:
        yield viewing(rows, max(sizes.tokens), device)
    for tokens in sizes.tokens:
        yield selecting(tokens, device, sizes.dtype)
