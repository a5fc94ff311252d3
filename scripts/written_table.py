"""A table in a document that the code writes, between two comments."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(page: str, begin: str, end: str, table: str) -> int:
    """Writes the table into ``docs/page``.

    With ``--check`` writes nothing; the exit status is 1 where it stands otherwise.
    """
    path = DOCS / page
    found = path.read_text(encoding="utf-8")
    head, rest = found.split(begin)
    _, tail = rest.split(end)
    written = f"{head}{begin}\n\n{table}\n\n{end}{tail}"
    if "--check" in sys.argv[1:]:
        return int(found != written)
    path.write_text(written, encoding="utf-8")
    return 0
