"""The words of the small models, and the formats that those were trained on.

Their tokenizer knows 240 words and makes one token of each. The lists below are the
data; the functions write a prompt of an exact number of words and its answer.
"""

# ruff: noqa: SIM905 (word lists read better as text)

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence

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

HOP_VALUES = (ADJECTIVES,)
"""Of each word of a variable's value: what it may be."""
MOST_HOPS = 4

Words = list[str]


def needle(rng: random.Random, num_words: int) -> tuple[Words, Words]:
    """One `the red key is 7 3 9 1 .` somewhere in filler; then the question.

    Returns:
        The words of the prompt and of the answer.

    Raises:
        ValueError: ``num_words`` are too few.
    """
    key = ["the", rng.choice(ADJECTIVES), "key", "is"]
    answer = rng.choices(DIGITS, k=4)
    question = ["question", ":", *key]
    fact = [*key, *answer, "."]
    room = num_words - len(question) - len(fact)
    if room < 0:
        raise ValueError(f"{num_words} words are too few for a needle")
    filling = filler(rng, room)
    at = rng.randint(0, room)
    return [*filling[:at], *fact, *filling[at:], *question], answer


def key_value(rng: random.Random, num_words: int) -> tuple[Words, Words]:
    """As many `a b c : 1 2 3 ;` pairs as fit, then the question for one of them.

    Near three in ten keys differ from another one in one letter. Less than a pair's
    length of filler makes up the number of words.

    Returns:
        The words of the prompt and of the answer.

    Raises:
        ValueError: ``num_words`` are too few.
    """
    question_length, pair_length = 6, 8
    room = num_words - question_length
    if room < pair_length:
        raise ValueError(f"{num_words} words are too few for a pair")
    keys = similar_keys(rng, room // pair_length)
    values = [rng.choices(DIGITS, k=3) for _ in keys]
    facts = [[*key, ":", *value, ";"] for key, value in zip(keys, values, strict=True)]
    asked = rng.randrange(len(keys))
    words = filler(rng, room % pair_length)
    for fact in facts:
        words += fact
    return [*words, "question", ":", *keys[asked], ":"], values[asked]


def hops(rng: random.Random, num_words: int, hop: int) -> tuple[Words, Words]:
    """`let V3 = ruby ;` and `let V9 = V3 ;` in any order; `question : value of V9 =`.

    As many statements as fit (48 at most), in chains of up to `MOST_HOPS` that share no
    variable and no value; half of the chains are as long as allowed. Filler between
    statements makes up the number of words.

    Args:
        rng: Draws everything.
        num_words: Words of the prompt.
        hop: Statements between the question and its value: V3 takes one, V9 two.

    Returns:
        The words of the prompt and of the answer.

    Raises:
        ValueError: ``num_words`` are too few, or ``hop`` is not in 1 to `MOST_HOPS`.
    """
    if not 1 <= hop <= MOST_HOPS:
        raise ValueError(f"hop {hop} is not in 1 to {MOST_HOPS}")
    question = ["question", ":", "value", "of"]
    room = num_words - len(question) - 2
    count = min(len(VARIABLES), room // (4 + len(HOP_VALUES)))
    if count < hop:
        raise ValueError(f"{num_words} words are too few for {hop} statements")
    names = rng.sample(VARIABLES, count)
    # The first chain is long enough to ask about.
    chains = [names[: max(hop, _chain_length(rng))]]
    at = len(chains[0])
    while at < count:
        chains.append(names[at : at + _chain_length(rng)])
        at += len(chains[-1])
    possible = list(itertools.product(*HOP_VALUES))
    chains = chains[: len(possible)]
    values = rng.sample(possible, len(chains))
    facts: list[Words] = []
    for chain, value in zip(chains, values, strict=True):
        source = list(value)
        for name in chain:
            facts.append(["let", name, "=", *source, ";"])
            source = [name]
    rng.shuffle(facts)
    asked, answer = rng.choice(
        [
            (chain[hop - 1], value)
            for chain, value in zip(chains, values, strict=True)
            if len(chain) >= hop
        ]
    )
    filling = filler(rng, room - sum(map(len, facts)))
    words = scatter(rng, facts, filling)
    return [*words, *question, asked, "="], list(answer)


def scatter(
    rng: random.Random, facts: Sequence[Words], filling: Sequence[str]
) -> Words:
    """The facts in their order at random places of the filling."""
    words: Words = []
    last = 0
    places = sorted(rng.randint(0, len(filling)) for _ in facts)
    for place, fact in zip(places, facts, strict=True):
        words += [*filling[last:place], *fact]
        last = place
    return [*words, *filling[last:]]


def filler(rng: random.Random, count: int) -> Words:
    """Random words with full stops or, one time in five, repeated sentences."""
    if rng.random() < 0.2:
        words: Words = []
        while len(words) < count:
            words += rng.choice(NOISE)
        return words[:count]
    words = rng.choices(FILLER, k=count)
    for i in range(rng.randrange(4, 12), count, 9):
        words[i] = "."
    return words


def _chain_length(rng: random.Random) -> int:
    return MOST_HOPS if rng.random() < 0.5 else rng.randint(1, MOST_HOPS)


def similar_keys(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """``count`` different keys of three letters, many one letter apart; shuffled."""
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
