"""The 240 words of the small models' tokenizer, by kind, and their ids."""

import json
from pathlib import Path

TOKENIZER_DIR = Path(__file__).parents[1] / "examples" / "deep_retriever"
"""Where the tokenizer's files are: every model trained here gets a copy of them."""


def _words() -> list[str]:
    raw = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


WORDS = _words()
IDS = {word: i for i, word in enumerate(WORDS)}

BOS = IDS["<s>"]
EOS = IDS["</s>"]
DIGITS = range(IDS["0"], IDS["9"] + 1)
LETTERS = range(IDS["a"], IDS["z"] + 1)
VARIABLES = range(IDS["V0"], IDS["V47"] + 1)
ADJECTIVES = range(IDS["red"], IDS["wine"] + 1)
FILLER = range(IDS["and"], IDS["back"] + 1)


def encode(text: str) -> list[int]:
    """Ids of words that blanks separate; KeyError if one is not in the vocabulary."""
    return [IDS[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words of ids, with blanks between them."""
    return " ".join(WORDS[i] for i in ids)
