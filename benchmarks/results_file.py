"""Results as JSON that git and people can compare: a row a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes results, which `json.loads` reads."""
    path.write_text(text(results) + "\n", encoding="utf-8")


def text(value: Any) -> str:
    """Opens lists of rows and what holds them; all else stays on its line."""
    if _is_table(value):
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
    if isinstance(value, dict) and _holds_tables(value):
        parts = (f"{json.dumps(name)}: {text(part)}" for name, part in value.items())
        return "{\n" + ",\n".join(parts) + "\n}"
    return json.dumps(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _holds_tables(value: dict[str, Any]) -> bool:
    return any(
        _is_table(part) or (isinstance(part, dict) and _holds_tables(part))
        for part in value.values()
    )
