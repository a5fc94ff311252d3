#!/usr/bin/env python3
"""Writes the table of endpoints in docs/limits.md, from the code's own.

python scripts/endpoint_table.py            # writes the document
python scripts/endpoint_table.py --check    # exit status 1 where it is not so
"""

from __future__ import annotations

import sys

from written_table import main

from asl_vllm.engine.frontend.apis import table

BEGIN = "<!-- endpoints: written by scripts/endpoint_table.py -->"
END = "<!-- end of endpoints -->"

if __name__ == "__main__":
    sys.exit(main("limits.md", BEGIN, END, table()))
