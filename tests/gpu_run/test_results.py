"""The documents quote the figures that are in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200"


def rows(stage: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{stage}.json").read_text())[
        "rows"
    ]
    return found


def test_the_table_of_first_tokens() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    for row in rows("prefill-8b-compiled"):
        begin = f"| {row['tokens']} | {row['engine']} | {row['work']:.2f} |"
        (line,) = [line for line in text.splitlines() if line.startswith(begin)]
        assert line.endswith(f"| {row['ratio']:.2f} |")


def test_what_the_readme_says() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    found = {
        (r["tokens"], r["engine"]): r["ratio"] for r in rows("prefill-8b-compiled")
    }
    mid = [f"{found[n, 'asl after layer 15']:.2f}" for n in (8192, 32768, 131072)]
    none = [f"{found[n, 'snapkv']:.2f}" for n in (8192, 32768, 131072)]
    said = "takes {} of stock vLLM's time to first token at 8192 tokens, {} at 32768"
    assert said.format(*mid[:2]) + f" and {mid[2]} at 131072" in text
    assert "without a selection {}, {} and {}".format(*none) in text


@pytest.mark.parametrize("path", RESULTS.glob("*.json"), ids=lambda path: path.stem)
def test_no_check_failed(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["status"] in ("passed", "shortened")
    assert all(row.get("ok", True) for row in result["rows"])
    assert "H200" in result["machine"]["gpu"]
