"""One stage in a process of its own: ``python -m benchmarks.gpu.child STAGE``.

Writes the stage's JSON anew after each row, so that a process that is killed leaves
what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Host, Skipped, Stage

RUNNING = "running"
PART = ".part"
"""Suffix of files that are being written."""


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces a file in one step."""
    part = path.with_suffix(PART)
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def run_stage(stage: Stage, host: Host, path: Path) -> str:
    """Runs a stage, writes its JSON to ``path`` and returns its status.

    What a stage raises goes through, after what it yielded was written.
    """
    began = time.perf_counter()
    result: dict[str, Any] = {"stage": stage.name, "what": stage.what}
    result |= {"status": RUNNING, "seconds": 0.0, "rows": []}

    def write() -> None:
        result["seconds"] = round(time.perf_counter() - began, 1)
        write_json(path, result)

    write()
    try:
        for row in stage.run(host):
            result["rows"].append(row)
            write()
            print(json.dumps(row), flush=True)
    except Skipped as why:
        result |= {"status": "skipped", "why": str(why)}
    else:
        wrong = [row for row in result["rows"] if row.get("ok") is False]
        result["status"] = "failed" if wrong or not result["rows"] else "passed"
        if wrong:
            result["why"] = f"{len(wrong)} of {len(result['rows'])} rows are not ok"
        elif not result["rows"]:
            result["why"] = "no rows"
    write()
    return str(result["status"])


def main(stages: Mapping[str, Stage]) -> None:
    """Runs the stage that is named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--output", type=Path, required=True, help="file for the JSON")
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in tiny sizes")
    args = parser.parse_args()
    host = Host(dry=args.dry, work=args.work)
    status = run_stage(stages[args.stage], host, args.output)
    raise SystemExit(0 if status in ("passed", "skipped") else 1)


if __name__ == "__main__":
    from benchmarks.gpu.stages import STAGES

    main(STAGES)
