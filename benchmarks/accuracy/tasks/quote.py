"""A sentence of 26 or 35 words to be quoted, hidden in natural text.

Source: this repository. What the sentence says cannot be guessed: its words are drawn
from lists. The text is of `benchmarks.accuracy.tasks.texts`, and sizes are its
tokens; so a prompt depends on the version of Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.accuracy.tasks import texts
from benchmarks.accuracy.tasks.base import Room, Sample, Task
from benchmarks.accuracy.tasks.english import word_list

QUESTION = (
    "A note of one sentence is hidden within the following text. Find it; I will ask "
    "you to quote it.\n\n{context}\n\nWhat does the note of {name} say, word by word?"
)
NOTE = 'The note of {name} says: "{sentence}."'
PREFIX = ' The note of {name} says: "'
NAMES = ("Alice", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry")
JOINTS = ("and", "while", "because", "although", "unless")


def clause(rng: random.Random) -> str:
    """Eight words."""
    one, other = (
        f"the {rng.choice(word_list('adjective'))} {rng.choice(word_list('noun'))}"
        for _ in range(2)
    )
    return f"{one} will {rng.choice(word_list('verb'))} {other}"


def build(rng: random.Random, size: int, room: Room) -> Sample:
    """One note among passages."""
    sentence = clause(rng)
    for _ in range(rng.choice((2, 3))):
        sentence += f" {rng.choice(JOINTS)} {clause(rng)}"
    # As sentences begin: a model that quotes corrects what does not.
    sentence = sentence[0].upper() + sentence[1:]
    name = rng.choice(NAMES)
    passages = texts.some(rng, size, room.count)
    note = NOTE.format(name=name, sentence=sentence)
    passages.insert(rng.randint(0, len(passages)), note)
    text = QUESTION.format(context="\n\n".join(passages), name=name)
    return Sample(text, (sentence,), PREFIX.format(name=name))


def words_in_order(text: str, answers: Sequence[str]) -> float:
    """Share of the answer's words that ``text`` has before its first wrong one."""
    wanted = answers[0].split()
    found = [word.strip('."') for word in text.split()]
    right = 0
    while right < len(wanted) and found[right : right + 1] == [wanted[right]]:
        right += 1
    return right / len(wanted)


TASK = Task(
    name="quote",
    source="natural text",
    build=build,
    score=words_in_order,
    max_tokens=96,
)
