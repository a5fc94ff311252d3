"""Natural text that every machine has: what Python's library says of itself."""

from __future__ import annotations

import ast
import bisect
import functools
import inspect
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

MODULES = (
    *("_pydecimal", "codecs", "concurrent/futures/_base", "difflib", "email/message"),
    *("ipaddress", "logging/__init__", "smtplib", "statistics", "tempfile", "textwrap"),
    *("threading", "typing", "unittest/case"),
)
"""Of the standard library; those that a Python version has not are passed over."""
FEWEST_WORDS, MOST_WORDS = 40, 200


@functools.cache
def passages() -> tuple[str, ...]:
    """Documentation strings of so many words, each once."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for module in MODULES:
        for path in (library / f"{module}.py", library / module / "__init__.py"):
            if path.exists():
                found |= dict.fromkeys(_documentation(path))
    return tuple(found)


def _documentation(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
                yield text


def some(rng: random.Random, size: int, count: Callable[[str], int]) -> list[str]:
    """Passages in no order, of about ``size`` in all; what there is begins anew.

    ``count`` says how much a text is. The last passage is cut off behind a word.
    """
    found: list[str] = []
    while True:
        for passage in rng.sample(passages(), len(passages())):
            own = count(passage)
            if own >= size:
                return [*found, _beginning(passage, size, count)]
            found.append(passage)
            size -= own


def _beginning(passage: str, size: int, count: Callable[[str], int]) -> str:
    ends = [0, *(word.end() for word in re.finditer(r"\S+", passage))]
    fitting = bisect.bisect_right(ends, size, key=lambda end: count(passage[:end]))
    return passage[: ends[max(1, fitting - 1)]]
