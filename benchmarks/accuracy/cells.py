"""What is asked: policies at budgets, and what of it a server can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from benchmarks.accuracy.client import Served
from benchmarks.accuracy.controls import CONTROLS

FULL = "full"
"""Prompts are not pruned."""
FIXABLE = ("asl", "fastkv", "gemfilter")
"""Policies that a server's ``selection_layer`` holds for."""


class CellError(ValueError):
    """A policy or budget that cannot be; the message says what, got and allowed."""


@dataclass(frozen=True)
class Cell:
    """A policy at a budget. ``label`` names the policy in results."""

    policy: str
    label: str
    budget: int | None
    """Tokens kept per layer; None for `FULL`."""


def parse_budget(text: str) -> Fraction | int:
    """An integer is tokens; a fraction such as ``1/8`` or ``0.125`` a share of N.

    Raises:
        CellError: Neither, or not in the allowed range.
    """
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value.denominator == 1 and value > 1:
        return int(value)
    if 0 < value < 1:
        return value
    raise CellError(f"budget: got {text!r}; allowed: tokens, or a share such as 1/8")


def tokens_of(budget: Fraction | int, length: int) -> int:
    """What is kept of prompts of ``length``."""
    return int(budget if isinstance(budget, int) else budget * length)


def label(policy: str, served: Served) -> str:
    """The policy's name, with the layer where the server fixes it: ``fastkv@3``."""
    layer = served.config.get("selection_layer")
    return f"{policy}@{layer}" if layer is not None and policy in FIXABLE else policy


def check_policies(policies: Sequence[str], served: Served) -> None:
    """Raises `CellError` for a policy that the server does not have."""
    pruning = tuple(name for name in served.policies if name != "none")
    allowed = (FULL, *CONTROLS, *pruning)
    for policy in policies:
        if policy not in allowed:
            raise CellError(
                f"policies: got {policy!r}; allowed with this server: "
                f"{', '.join(allowed)}"
                + ("" if pruning else "; the others need one with --kv-policy")
            )


def cells(
    policies: Sequence[str],
    budgets: Sequence[Fraction | int],
    length: int,
    served: Served,
) -> Iterator[Cell]:
    """Each policy at each budget that prunes prompts of ``length`` at all, once.

    Budgets below the server's smallest, and those of at least ``length``, are left
    out for all policies alike.
    """
    sizes = dict.fromkeys(tokens_of(budget, length) for budget in budgets)
    for policy in dict.fromkeys(policies):
        if policy == FULL:
            yield Cell(FULL, FULL, None)
            continue
        for tokens in sizes:
            if served.minimum_budget <= tokens < length:
                yield Cell(policy, label(policy, served), tokens)
