"""What a run came to, as a short table, and all its figures as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Row
from benchmarks.report import cell, common_and_table, title_and_text


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A line a stage: its status, its time, and what there is to say."""
    lines = [("stage", "status", "s", "")]
    for result in results:
        seconds = f"{result['seconds']:.0f}"
        lines.append((result["stage"], result["status"], seconds, remark(result)))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    table = "\n".join(
        f"{name:<{widths[0]}}  {status:<{widths[1]}}  {seconds:>{widths[2]}}  {text}"
        for name, status, seconds, text in lines
    )
    return "\n".join(line.rstrip() for line in table.splitlines())


def remark(result: dict[str, Any]) -> str:
    """The ratios to stock vLLM, or how many checks hold, or why there are none."""
    rows = result["rows"]
    ratios = [row["ratio"] for row in rows if isinstance(row.get("ratio"), float)]
    checks = [row["ok"] for row in rows if "ok" in row]
    parts = []
    if checks:
        parts.append(f"{sum(checks)} of {len(checks)} checks ok")
    if ratios:
        low, high = min(ratios), max(ratios)
        parts.append(f"{len(ratios)} ratios to stock, {low:.2f} to {high:.2f}")
    if not parts and rows:
        parts.append(f"{len(rows)} rows")
    if result.get("why"):
        parts.append(result["why"])
    return "; ".join(parts)


def markdown_rows(rows: Sequence[Row]) -> str:
    """Rows as a table whose columns are those of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    body = [line([cell(row.get(column)) for column in columns]) for row in rows]
    return "\n".join([line(columns), "|" + "---|" * len(columns), *body])


def figures(rows: Sequence[Row]) -> str:
    """The rows of a pair of engines: a table an experiment.

    Its title says what all its rows share.
    """
    parts = []
    for name in dict.fromkeys(row["experiment"] for row in rows):
        own = [row for row in rows if row["experiment"] == name]
        common, table = common_and_table(name, own)
        title = f"**{title_and_text(name)[0]}**" + f" ({common})" * bool(common)
        parts += [f"{title}:", table]
    return "\n\n".join(parts)


def read(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def page(results: Sequence[dict[str, Any]]) -> str:
    """All figures of a run: a section a stage."""
    machines = [result["machine"] for result in results if result.get("machine")]
    parts = ["# Results on a GPU", "Written by `python -m benchmarks.gpu --page`."]
    for machine in {json.dumps(m, sort_keys=True): m for m in machines}.values():
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        parts.append(
            f"Machine: {machine['gpu']}, driver {machine['driver']}, CUDA "
            f"{machine['cuda']}; Python {machine['python']}, {versions}; "
            f"{machine['date']}."
        )
    for result in results:
        parts.append(f"## {result['stage']}")
        parts.append(f"{result['what']}: {result['status']}.")
        if result.get("why"):
            parts.append(f"{result['why'].capitalize()}.")
        if result["rows"]:
            parts.append(markdown_rows(result["rows"]))
    return "\n\n".join(parts) + "\n"
