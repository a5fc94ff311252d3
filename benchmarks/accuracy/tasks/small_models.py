"""The tasks that the small models can read: needle, key_value, hops_1 to _4.

Source: this repository, `benchmarks.accuracy.tasks.words`. Sizes are words.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from benchmarks.accuracy.scoring import first_words
from benchmarks.accuracy.tasks import words
from benchmarks.accuracy.tasks.base import Room, Sample, Task

Write = Callable[[random.Random, int], tuple[words.Words, words.Words]]


def _task(name: str, write: Write, max_tokens: int, smallest: int) -> Task:
    def build(rng: random.Random, size: int, room: Room) -> Sample:
        prompt, answer = write(rng, size)
        return Sample(" ".join(prompt), (" ".join(answer),))

    return Task(
        name=name,
        source="this project",
        build=build,
        score=first_words,
        max_tokens=max_tokens,
        smallest=smallest,
    )


TASKS = (
    _task("needle", words.needle, 4, 15),
    _task("key_value", words.key_value, 3, 14),
    *(
        _task(
            f"hops_{hop}",
            functools.partial(words.hops, hop=hop),
            len(words.HOP_VALUES),
            6 + hop * (4 + len(words.HOP_VALUES)),
        )
        for hop in range(1, words.MOST_HOPS + 1)
    ),
)
