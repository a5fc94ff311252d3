#!/usr/bin/env python3
"""Writes the table of endpoints in docs/limits.md, from the code's own.

python scripts/endpoint_table.py            # writes the document
python scripts/endpoint_table.py --check    # exit status 1 where it is not so
"""

from __future__ import annotations

import sys
from pathlib import Path

from asl_vllm.engine.frontend.apis import table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "limits.md"
BEGIN = "<!-- endpoints: written by scripts/endpoint_table.py -->"
END = "<!-- end of endpoints -->"


def main() -> int:
    """Writes the page, or with ``--check`` says whether it is as written."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    written = f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        return int(page != written)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
