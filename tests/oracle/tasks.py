"""Retrieval prompts in the formats that the shipped tiny model was trained on.

A prompt has exactly as many tokens as asked for, BOS included. Its text leaves BOS
out, because the tokenizer adds it.
"""

# ruff: noqa: SIM905 (word lists read better as text)

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
DIGITS = list(string.digits)
LETTERS = list(string.ascii_lowercase)
VARIABLES = [f"V{i}" for i in range(48)]
PUNCTUATION = ["|", ":", ";", "=", ".", "?", ","]
KEYWORDS = "question answer the key is let value of what find".split()
ADJECTIVES = (
    "red blue green gold black white pink gray brown purple orange silver amber ruby "
    "jade coral navy lime teal plum olive tan rust snow mint rose sand pearl bronze "
    "copper ivory wine"
).split()
FILLER = (
    "and to in that it was for on are as with his they at be this have from or had by "
    "hot word but some we can out other were all there when up use your how said an "
    "each she which do their time if will way about many then them write would like "
    "so these her long make thing see him two has look more day could go come did "
    "number sound no most people my over know water than call first who may down side "
    "been now sky sun grass here yellow again back"
).split()
NOISE = [
    sentence.split()
    for sentence in (
        "the grass is green .",
        "the sky is blue .",
        "the sun is yellow .",
        "here we go .",
        "there and back again .",
    )
]
VOCABULARY = (
    SPECIAL
    + DIGITS
    + LETTERS
    + VARIABLES
    + PUNCTUATION
    + KEYWORDS
    + ADJECTIVES
    + FILLER
)
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
BOS_ID = WORD_IDS["<s>"]
EOS_ID = WORD_IDS["</s>"]


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
    key = ["the", rng.choice(ADJECTIVES), "key", "is"]
    answer = rng.choices(DIGITS, k=4)
    question = ["question", ":", *key]
    fact = [*key, *answer, "."]
    room = num_tokens - 1 - len(question) - len(fact)
    if room < 0:
        raise ValueError(f"{num_tokens} tokens are too few for a needle")
    filler = _filler(rng, room)
    at = rng.randint(0, room)
    return _prompt([*filler[:at], *fact, *filler[at:], *question], answer)


def key_value(seed: int, num_tokens: int) -> Prompt:
    """As many `a b c : 1 2 3 ;` pairs as fit, then the question for one of them.

    Near three in ten keys differ from another one in one letter. Less than a pair's
    length of filler makes up the number of tokens.
    """
    rng = random.Random(f"key_value {seed} {num_tokens}")
    question_length, pair_length = 6, 8
    room = num_tokens - 1 - question_length
    if room < pair_length:
        raise ValueError(f"{num_tokens} tokens are too few for a pair")
    keys = _keys(rng, room // pair_length)
    values = [rng.choices(DIGITS, k=3) for _ in keys]
    facts = [[*key, ":", *value, ";"] for key, value in zip(keys, values, strict=True)]
    asked = rng.randrange(len(keys))
    words = _filler(rng, room % pair_length)
    for fact in facts:
        words += fact
    return _prompt([*words, "question", ":", *keys[asked], ":"], values[asked])


def _keys(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """`count` different keys of three letters, shuffled."""
    keys: dict[tuple[str, ...], None] = {}
    previous = None
    while len(keys) < count:
        if previous is not None and rng.random() < 0.3:
            changed = list(previous)
            changed[rng.randrange(3)] = rng.choice(LETTERS)
            key = tuple(changed)
        else:
            key = tuple(rng.choices(LETTERS, k=3))
        previous = None if key in keys else key
        keys[key] = None
    shuffled = list(keys)
    rng.shuffle(shuffled)
    return shuffled


def _filler(rng: random.Random, count: int) -> list[str]:
    """Random words with full stops or, one time in five, repeated sentences."""
    if rng.random() < 0.2:
        words: list[str] = []
        while len(words) < count:
            words += rng.choice(NOISE)
        return words[:count]
    words = rng.choices(FILLER, k=count)
    for i in range(rng.randrange(4, 12), count, 9):
        words[i] = "."
    return words


def _prompt(words: Sequence[str], answer: list[str]) -> Prompt:
    ids = [BOS_ID, *(WORD_IDS[word] for word in words)]
    return Prompt(" ".join(words), ids, answer)


TASKS: dict[str, Callable[[int, int], Prompt]] = {
    "needle": needle,
    "key_value": key_value,
}
