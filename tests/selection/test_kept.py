"""Kept tokens: the highest scores, later ones first among equals, and the window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asl_kernels.rank_variance import descending_ranks
from asl_vllm.selection.kept import BestOfEach, best_and_tail, top_tokens


def naive_top(scores: list[float], count: int) -> list[int]:
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))
    return sorted(best_first[:count])


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    tokens = draw(st.integers(1, 30))
    value = st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 9.0])
    line = st.lists(value, min_size=tokens, max_size=tokens)
    return draw(st.lists(line, min_size=1, max_size=4)), draw(st.integers(1, tokens))


@settings(max_examples=150, deadline=None)
@given(scored())
def test_top_tokens_match_sorting(case: tuple[list[list[float]], int]) -> None:
    scores, count = case
    got = top_tokens(torch.tensor(scores), count)
    assert got.dtype == torch.int64
    assert got.tolist() == [naive_top(row, count) for row in scores]
    assert top_tokens(torch.tensor(scores[0]), count).tolist() == got[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top_tokens_are_the_best_ranked(dtype: torch.dtype) -> None:
    scores = torch.randn(5000).to(dtype)  # bf16: many ties
    ranks = descending_ranks(scores)
    for count in (1, 77, 4999, 5000):
        kept = top_tokens(scores, count)
        assert torch.equal(kept, (ranks <= count).nonzero().squeeze(1))


def test_kept_score_no_lower_than_dropped() -> None:
    scores = torch.randn(3, 2, 400)
    kept = top_tokens(scores, 100)
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
    assert (stays.sum(-1) == 100).all()
    worst = scores.masked_fill(~stays, torch.inf).amin(-1)
    best_dropped = scores.masked_fill(stays, -torch.inf).amax(-1)
    assert (worst >= best_dropped).all()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("tail", [1, 4])
def test_of_several_layers_the_best_are_those_of_each(heads: int, tail: int) -> None:
    columns, best = [7, 30, 1, 30], [3, 30, 1, 12]
    counts = [count + tail for count in best]
    random = torch.Generator().manual_seed(tail)
    # Few values: many ties, at the ends too, beside the tail and the next layer.
    scores = [torch.randint(4, (heads, n), generator=random).float() for n in columns]
    found = BestOfEach(columns, counts, tail, scores[0].device)(scores)
    for own, layer, count in zip(found, scores, counts, strict=True):
        assert torch.equal(own, best_and_tail(layer, count, tail))


def test_scores_that_are_no_numbers_give_tokens() -> None:
    """Whoever asked is told later; the others' are theirs."""
    scores = [torch.full((2, 6), float("nan")), torch.rand(2, 9), torch.zeros(2, 5)]
    scores[2][0, 1] = torch.inf
    found = BestOfEach([6, 9, 5], [5, 6, 4], 2, scores[0].device)(scores)
    for own, columns in zip(found, (6, 9, 5), strict=True):
        assert 0 <= int(own.min()) <= int(own.max()) < columns + 2
    assert torch.equal(found[1], best_and_tail(scores[1], 6, 2))


def test_ties_favour_the_later_token() -> None:
    assert top_tokens(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), 3).tolist() == [1, 2, 3]
    assert top_tokens(torch.zeros(9), 2).tolist() == [7, 8]


def test_heads_keep_their_own_tokens_and_the_window() -> None:
    head_scores = torch.tensor([[5.0, 1.0, 4.0, 0.0], [0.0, 6.0, 1.0, 1.0]])
    kept = best_and_tail(head_scores, count=5, tail=3)
    assert kept.tolist() == [[0, 2, 4, 5, 6], [1, 3, 4, 5, 6]]
    deeper = best_and_tail(head_scores.sum(0), count=4, tail=3)
    assert deeper.tolist() == [1, 4, 5, 6]


@pytest.mark.parametrize(("prefix", "window"), [(1, 1), (1, 64), (100, 8)])
def test_every_token_may_be_kept(prefix: int, window: int) -> None:
    everything = torch.arange(prefix + window)
    kept = best_and_tail(torch.randn(3, prefix), prefix + window, window)
    assert torch.equal(kept, everything.expand(3, -1))
    got = best_and_tail(torch.randn(prefix), prefix + window, window)
    assert torch.equal(got, everything)


def test_no_result_is_read_by_the_host() -> None:
    # Meta tensors have no data: reading any, or a shape that depends on it, raises.
    scores = torch.empty(4, 90, device="meta")
    assert best_and_tail(scores, 40, 8).shape == (4, 40)
    assert best_and_tail(scores[0], 40, 8).shape == (40,)


def test_bad_arguments() -> None:
    scores = torch.ones(2, 10)
    for count in (0, -1, 11):
        with pytest.raises(ValueError, match=rf"count: got {count}; allowed: 1 to 10"):
            top_tokens(scores, count)
    for count in (8, 19):
        message = rf"count: got {count}; allowed: 9 to 18 tokens \(8 always stay\)"
        with pytest.raises(ValueError, match=message):
            best_and_tail(scores, count, tail=8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("many", [1, 30, 50])
def test_scores_that_are_not_finite_still_give_tokens(bad: float, many: int) -> None:
    """They are found out later; until then rows are read where these say."""
    scores = torch.rand(3, 50)
    scores[1, :many] = bad
    for count in (1, 20, 50):
        for _ in range(3):  # memory that was used before holds other numbers
            torch.full((3, count + 1), 10**9, dtype=torch.int64)
            found = top_tokens(scores, count)
            assert found.shape == (3, count)
            assert 0 <= found.min() <= found.max() < 50
