"""What a task is: it writes questions of any size and scores answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A question as text. ``prefix`` begins the model's answer, blanks included."""

    text: str
    answers: tuple[str, ...]
    prefix: str = ""


@dataclass(frozen=True)
class Room:
    """What a question may depend on beside its size.

    length: tokens asked for, prompt and answer together.
    count: the tokens of a text, in the model's tokenizer.
    """

    length: int
    count: Callable[[str], int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of question.

    build: writes one, given a generator, its size in units of the task's own (noise
        sentences, pairs, words) and its room. The same arguments give the same one.
    score: from an answer and the right ones to a number in [0, 1].
    max_tokens: tokens an answer may have.
    smallest, largest: sizes that ``build`` takes; None: no limit.
    source: where the task was published, for results.
    own_answer: there is no right answer; the unpruned model's own is forced on the
        pruned cache, and the score is `benchmarks.accuracy.fidelity`'s agreement.
    """

    name: str
    source: str
    build: Callable[[random.Random, int, Room], Sample]
    score: Callable[[str, Sequence[str]], float]
    max_tokens: int
    smallest: int = 1
    largest: int | None = None
    own_answer: bool = False
