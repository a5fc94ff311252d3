"""The commands in a document: of its shell blocks, after a prompt, and in a line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asl_vllm_testing import ROOT

_INLINE = re.compile(
    r"`((?:make|vllm|pip|python3?|\.venv/bin/\w+|scripts/\w+\.py|\.ci/run)"
    r"(?: [^`]+)?)`"
)


@dataclass(frozen=True)
class Command:
    """A command with its arguments, and where it stands."""

    document: str
    text: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {self.text[:60]}"


def _blocks(text: str) -> Iterator[str]:
    """The lines of a document that are for a shell, or for Python."""
    kind: str | None = None
    found: list[str] = []
    before = ""
    for line in [*text.splitlines(), ""]:
        fence = re.match(r"```(\w*)", line)
        indented = kind is None and line.startswith("    ")
        if fence:
            kind = fence[1] if kind is None else None
        elif kind == "sh":
            found.append(line)
        elif kind == "" and line.startswith("$ "):
            yield line[2:]
        elif indented and (found or not before):
            found.append(line[4:])
        elif found:
            yield "\n".join(found)
            found = []
        if fence and found:
            yield "\n".join(found)
            found = []
        before = line


def _split(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a block: its text and its words, without comments."""
    text = ""
    for line in block.splitlines():
        text += line.removesuffix("\\") + ("\n" if line[-1:] != "\\" else "")
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        if words:
            yield text.strip(), words
        text = ""
    assert not text.strip(), f"has no end: {text}"


def commands_of(document: Path) -> Iterator[Command]:
    """Every command of a Markdown file of the repository; ``LLM(...)`` as well."""
    text = document.read_text("utf-8")
    name = document.relative_to(ROOT).as_posix()
    inline = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    for block in [*_blocks(text), *_INLINE.findall(inline)]:
        if block.startswith("LLM("):
            yield Command(name, block, ("LLM",))
            continue
        for command, words in _split(block):
            yield Command(name, command, tuple(words))
