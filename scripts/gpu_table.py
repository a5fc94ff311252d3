#!/usr/bin/env python3
"""Writes the figures of docs/gpu.md, from the JSON of a run on an H100.

python scripts/gpu_table.py            # writes the document
python scripts/gpu_table.py --check    # exit status 1 where it is not so
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from written_table import main

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "speed-8b.json"
BEGIN = "<!-- figures: written by scripts/gpu_table.py -->"
END = "<!-- end of figures -->"

if __name__ == "__main__":
    from benchmarks.gpu.table import figures

    text = figures(json.loads(RESULTS.read_text())["rows"])
    sys.exit(main("gpu.md", BEGIN, END, text))
