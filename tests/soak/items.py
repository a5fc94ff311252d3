"""What a soak run asks, and what the oracle answers to it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing.harness import BLOCK
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder

RULE: dict[str, Any] = {
    "window": 16,
    "pool_kernel": 7,
    "l_min": 2,
    "l_obs": 3,
    "tau": 0.6,
}
MAX_TOKENS = 24


@dataclass(frozen=True)
class Item:
    """A prompt and a budget, and what the oracle answers to them."""

    prompt: list[int]
    budget: int | None
    pruned_tokens: int
    answer: list[int]
    stop: str | None = None
    """Text that ends the answer."""

    def stopped(self, place: int) -> Item:
        """The same question, to be ended by the word of the answer's token there."""
        words = [f"w{token}" for token in self.answer]
        end = next(i for i, word in enumerate(words) if words[place] in word)
        return replace(self, answer=self.answer[: end + 1], stop=words[place])


def catalogue(
    model: Path, items: int, *, longest: int = 1500, seed: int = 0
) -> list[Item]:
    """Prompts of which many share beginnings; answers in plain fp32 PyTorch.

    In each three the second goes on where the first, which has no budget, ends, or both
    others are so short that they pass together.
    """
    rng = random.Random(seed)
    oracle = TinyDecoder.load(model)
    beginnings = [[rng.randrange(4, 512) for _ in range(400)] for _ in range(4)]
    made = []
    for number in range(items):
        budget = None if number % 3 == 0 else rng.randrange(48, 300)
        most = (500 if budget is None else longest) - 400
        own = [rng.randrange(4, 512) for _ in range(rng.randrange(20, most))]
        first = rng.choice(beginnings)[: rng.randrange(400)]
        prompt = made[-1].prompt + own if number % 3 == 1 else first + own
        if number % 6 > 3:
            prompt, budget = prompt[-rng.randrange(85, 128) :], 48
        kept = resolve_kept(
            budget,
            num_prompt_tokens=len(prompt),
            block_size=BLOCK,
            window=RULE["window"],
        )
        truth = generate(oracle, prompt, kept=kept, max_tokens=MAX_TOKENS, **RULE)
        made.append(Item(prompt, budget, len(prompt) - kept, truth.tokens))
    return made
