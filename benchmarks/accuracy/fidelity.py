"""How far predictions over a pruned cache are from the unpruned model's own.

The unpruned model's greedy answer is forced on the pruned cache, token by token. No
right answer is needed, so this measures any model on any text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """Means over an answer's tokens."""

    agreement: float
    """Share of the tokens that are also the most likely ones here: top-1 agreement."""
    kl: float
    """Kullback-Leibler divergence of these predictions from the unpruned ones, in
    nats: sum of p log(p / q), p the unpruned model's."""


def of_logits(unpruned: Tensor, pruned: Tensor) -> Fidelity:
    """Args: logits ``[n, vocabulary]`` at the same n tokens of the answer."""
    p, q = unpruned.log_softmax(-1), pruned.log_softmax(-1)
    return Fidelity(
        agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
    )


def of_top(
    unpruned: Sequence[Mapping[int, float]], pruned: Sequence[Mapping[int, float]]
) -> Fidelity:
    """Args: of each token of the answer the most likely ids with their logprobs.

    What only one side lists, and all that neither does, counts as one token; so the
    divergence is at most the true one.
    """
    pairs = list(zip(unpruned, pruned, strict=True))
    return Fidelity(
        agreement=sum(_best(p) == _best(q) for p, q in pairs) / len(pairs),
        kl=sum(_coarse_kl(p, q) for p, q in pairs) / len(pairs),
    )


def _best(logprobs: Mapping[int, float]) -> int:
    return max(logprobs, key=logprobs.__getitem__)


def _coarse_kl(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    both = p.keys() & q.keys()
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    rest_p, rest_q = (1 - sum(math.exp(side[t]) for t in both) for side in (p, q))
    if rest_p > 0 and rest_q > 0:  # Rounding may leave less than nothing.
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)
