#!/usr/bin/env python3
"""Writes the table of architectures in docs/models.md, from what the suite runs.

python scripts/model_table.py            # writes the document
python scripts/model_table.py --check    # exit status 1 where it is not so
"""

from __future__ import annotations

import sys

from written_table import main

from asl_vllm_testing.architectures import table

BEGIN = "<!-- architectures: written by scripts/model_table.py -->"
END = "<!-- end of architectures -->"

if __name__ == "__main__":
    sys.exit(main("models.md", BEGIN, END, table()))
