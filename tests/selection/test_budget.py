"""Budgets: what is refused and how, and the arithmetic of kept tokens."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asl_vllm.selection.budget import (
    BudgetError,
    minimum_budget,
    resolve_kept,
    validate_budget,
)

block_sizes = st.sampled_from([1, 16, 32, 64, 128, 784])


def test_minimum_is_window_and_a_block() -> None:
    assert minimum_budget(32, 16) == 48


@pytest.mark.parametrize("value", [None, 48, 49, 10**9, 1e-9, 0.5, 1.0])
def test_good_values_pass_unchanged(value: int | float | None) -> None:
    got = validate_budget(value, minimum=48)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (0, "send a positive number, or null"),
        (-5, "send a positive number, or null"),
        (1, "1 is one token; for the whole prompt send 1.0"),
        (47, "raise it to 48 or more"),
        (0.0, "for a share at most 1.0"),
        (-0.0, "for a share at most 1.0"),
        (-0.5, "for a share at most 1.0"),
        (1.5, "for tokens send an integer, for a share at most 1.0"),
        (2048.0, "for tokens send an integer, 2048"),
        (math.nan, "for a share at most 1.0"),
        (math.inf, "for a share at most 1.0"),
        (-math.inf, "for a share at most 1.0"),
        (True, "send a JSON number or null"),
        (False, "send a JSON number or null"),
        ("2048", "send a JSON number or null"),
        ("", "send a JSON number or null"),
        ([2048], "send a JSON number or null"),
        ({}, "send a JSON number or null"),
        (2048j, "send a JSON number or null"),
        (b"1", "send a JSON number or null"),
    ],
    ids=repr,
)
def test_bad_values_say_what_is_allowed(value: Any, remedy: str) -> None:
    allowed = "an integer of at least 48 tokens per layer (observation window + KV"
    with pytest.raises(BudgetError, match=re.escape(allowed)) as caught:
        validate_budget(value, minimum=48)
    assert str(caught.value).startswith(f"kv_budget: got {value!r}; allowed: ")
    assert remedy in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_enormous_values_give_short_messages() -> None:
    for value in ("x" * 10**6, -(10**5000), [0] * 10**5):
        with pytest.raises(BudgetError) as caught:
            validate_budget(value, minimum=48)
        assert len(str(caught.value)) < 400
    assert resolve_kept(10**5000, num_prompt_tokens=9, block_size=16, window=8) == 9


@pytest.mark.parametrize(
    ("budget", "tokens", "kept"),
    [
        (None, 1000, 1000),
        (1000, 1000, 1000),
        (5000, 1000, 1000),
        (1.0, 1000, 1000),
        (999, 1000, 984),  # one token over the budget costs a block
        (984, 1000, 984),
        (983, 1000, 968),
        (48, 1000, 40),
        (0.5, 1000, 488),  # 500 tokens
        (1e-6, 1000, 40),  # raised to the minimum of 48
        (0.5, 40, 40),  # the minimum exceeds the prompt
        (0.5, 49, 33),  # the minimum prunes the prompt by one block
        (48, 49, 33),
        (0.5, 1, 1),
    ],
)
def test_examples(budget: int | float | None, tokens: int, kept: int) -> None:
    got = resolve_kept(budget, num_prompt_tokens=tokens, block_size=16, window=32)
    assert got == kept


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(1, 200_000),
    over_minimum=st.integers(0, 200_000),
    block_size=block_sizes,
    window=st.integers(1, 64),
)
def test_tokens(tokens: int, over_minimum: int, block_size: int, window: int) -> None:
    budget = minimum_budget(window, block_size) + over_minimum
    kept = resolve_kept(
        budget, num_prompt_tokens=tokens, block_size=block_size, window=window
    )
    if budget >= tokens:
        assert kept == tokens
    else:
        assert (tokens - kept) % block_size == 0
        assert budget - block_size < kept <= budget
        assert kept > window


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(1, 200_000),
    share=st.floats(0, 1, exclude_min=True),
    block_size=block_sizes,
    window=st.integers(1, 64),
)
def test_shares(tokens: int, share: float, block_size: int, window: int) -> None:
    minimum = minimum_budget(window, block_size)
    kept = resolve_kept(
        share, num_prompt_tokens=tokens, block_size=block_size, window=window
    )
    assert kept == resolve_kept(
        max(minimum, math.floor(share * tokens)),
        num_prompt_tokens=tokens,
        block_size=block_size,
        window=window,
    )
    assert window < kept <= max(minimum, share * tokens) or kept == tokens


def test_bad_budgets_are_not_resolved() -> None:
    with pytest.raises(BudgetError, match="at least 48 tokens"):
        resolve_kept(47, num_prompt_tokens=1000, block_size=16, window=32)
