"""A question about natural text that has no one answer: the model's own is the measure.

Source: this repository. How far a pruned prompt's predictions are from the unpruned
one's: see `benchmarks.accuracy.fidelity`. Sizes are tokens of
`benchmarks.accuracy.tasks.texts`, so a prompt depends on the version of Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.accuracy.tasks import texts
from benchmarks.accuracy.tasks.base import Room, Sample, Task

QUESTION = (
    "Here are passages of a manual.\n\n{context}\n\nExplain in your own words what "
    "the passages above are about, one after the other."
)


def build(rng: random.Random, size: int, room: Room) -> Sample:
    """Passages in no order."""
    return Sample(
        QUESTION.format(context="\n\n".join(texts.some(rng, size, room.count))), ()
    )


def no_score(text: str, answers: Sequence[str]) -> float:
    """An answer alone is neither right nor wrong."""
    raise NotImplementedError


TASK = Task(
    name="explain",
    source="natural text",
    build=build,
    score=no_score,
    max_tokens=64,
    own_answer=True,
)
