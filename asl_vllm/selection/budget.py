"""Budgets: what a request may ask for, and how many tokens that keeps."""

from __future__ import annotations

import math


class BudgetError(ValueError):
    """A bad ``kv_budget``: the message says what, got, allowed, and the remedy."""


def minimum_budget(window: int, block_size: int) -> int:
    """Smallest budget in tokens: the window, and a block that alignment may take."""
    return window + block_size


def validate_budget(value: object, *, minimum: int) -> int | float | None:
    """Returns ``value`` if it is a budget.

    Args:
        value: None; an int of at least ``minimum`` tokens per layer; or a float in
            (0, 1], a share of the prompt.
        minimum: Tokens, as `minimum_budget` gives it.

    Raises:
        BudgetError: Anything else.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= minimum:
            return value
        if value == 1:
            # JSON of JavaScript has no other form of 1.0.
            hint = (
                "1 is one token; for the whole prompt send 1.0, or from JavaScript, "
                "which writes 1.0 as 1, an integer beyond the prompt's tokens"
            )
        elif value > 0:
            hint = f"raise it to {minimum} or more"
        else:
            hint = "send a positive number, or null to leave it out"
        raise _error(value, minimum, hint)
    if isinstance(value, float):
        if 0.0 < value <= 1.0:
            return value
        if value > 1.0 and value.is_integer():
            hint = f"for tokens send an integer, {int(value)}"
        else:
            hint = "for tokens send an integer, for a share at most 1.0"
        raise _error(value, minimum, hint)
    raise _error(value, minimum, "send a JSON number or null")


class PrunedPrompt:
    """The arithmetic of a prompt whose leading blocks are pruned; kept in one place.

    Whoever inherits it has ``num_prompt_tokens``, ``pruned_blocks`` and
    ``block_size``; all else follows from these.
    """

    num_prompt_tokens: int
    """N."""
    pruned_blocks: int
    """Blocks that a layer does without; 0 = stock vLLM."""
    block_size: int
    """Tokens of a block."""

    @property
    def pruned_tokens(self) -> int:
        """Tokens a layer drops."""
        return self.pruned_blocks * self.block_size

    @property
    def kept_tokens(self) -> int:
        """k, the observation window and the last prompt token included."""
        return self.num_prompt_tokens - self.pruned_tokens


def budget_tokens(budget: int | float, *, num_prompt_tokens: int, minimum: int) -> int:
    """A budget in tokens: a share is of N, rounded down, and at least ``minimum``."""
    if isinstance(budget, int):
        return budget
    return max(minimum, math.floor(budget * num_prompt_tokens))


def resolve_blocks(
    budget: int | float | None, *, num_prompt_tokens: int, block_size: int, window: int
) -> int:
    """Blocks of a prompt of N tokens that each layer prunes.

    0 when nothing is to be pruned; otherwise the fewest that leave at most the
    budget's tokens. What is left is above ``window``.

    Args:
        budget: What `validate_budget` accepts.
        num_prompt_tokens: N.
        block_size: Tokens a KV block.
        window: W, tokens that are always kept.
    """
    if budget is None:
        return 0
    tokens = budget_tokens(
        budget,
        num_prompt_tokens=num_prompt_tokens,
        minimum=minimum_budget(window, block_size),
    )
    if tokens >= num_prompt_tokens:
        return 0
    blocks = -(-(num_prompt_tokens - tokens) // block_size)
    assert window < num_prompt_tokens - blocks * block_size <= tokens
    return blocks


def resolve_kept(
    budget: int | float | None, *, num_prompt_tokens: int, block_size: int, window: int
) -> int:
    """Tokens k that each layer keeps of a prompt: N less what `resolve_blocks` prunes.

    Raises:
        BudgetError: A budget that `validate_budget` refuses.
    """
    validate_budget(budget, minimum=minimum_budget(window, block_size))
    blocks = resolve_blocks(
        budget,
        num_prompt_tokens=num_prompt_tokens,
        block_size=block_size,
        window=window,
    )
    return num_prompt_tokens - blocks * block_size


def _error(value: object, minimum: int, hint: str) -> BudgetError:
    return BudgetError(
        f"kv_budget: got {shown(value)}; allowed: an integer of at least {minimum} "
        "tokens per layer (observation window + KV block size), a float above 0 and "
        f"up to 1.0 (a share of the prompt), or null; {hint}."
    )


def shown(value: object, longest: int = 80) -> str:
    """A request's value as messages show it: cut short, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= longest else text[:longest] + "..."
