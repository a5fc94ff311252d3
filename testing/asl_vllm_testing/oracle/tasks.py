"""Retrieval prompts in the formats that the small models were trained on.

A prompt has exactly as many tokens as asked for, BOS included. Its text leaves BOS
out, because the tokenizer adds it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.accuracy.tasks import words
from benchmarks.accuracy.tasks.words import VOCABULARY

WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
BOS_ID = WORD_IDS["<s>"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as text (without BOS) and as ids (with it), and the right answer."""

    text: str
    token_ids: list[int]
    answer_words: list[str]

    @property
    def answer_ids(self) -> list[int]:
        return [WORD_IDS[word] for word in self.answer_words]


def needle(seed: int, num_tokens: int) -> Prompt:
    """One `the red key is 7 3 9 1 .` somewhere in filler; then the question."""
    rng = random.Random(f"needle {seed} {num_tokens}")
    return _prompt(*words.needle(rng, num_tokens - 1))


def key_value(seed: int, num_tokens: int) -> Prompt:
    """As many `a b c : 1 2 3 ;` pairs as fit, then the question for one of them."""
    rng = random.Random(f"key_value {seed} {num_tokens}")
    return _prompt(*words.key_value(rng, num_tokens - 1))


def _prompt(written: Sequence[str], answer: list[str]) -> Prompt:
    ids = [BOS_ID, *(WORD_IDS[word] for word in written)]
    return Prompt(" ".join(written), ids, answer)


TASKS: dict[str, Callable[[int, int], Prompt]] = {
    "needle": needle,
    "key_value": key_value,
}
