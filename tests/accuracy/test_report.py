"""Summaries: intervals, layers, work; tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import report
from benchmarks.accuracy.run import token_layers
from benchmarks.accuracy.summary import summary, wilson
from tests.accuracy.records import RECORDS, record

RUN = {"model": "tiny", "split": "test", "seed": 0}


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe, 1998 (Statistics in Medicine 17, p. 861, table I, method 3).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


def test_an_interval_needs_a_number() -> None:
    with pytest.raises(ValueError, match="got 0"):
        wilson(0.0, 0)


def test_rows() -> None:
    rows = summary(RECORDS)
    assert [(row["policy"], row["task"]) for row in rows] == [
        ("full", "needle"),
        ("full", "key_value"),
        ("random", "needle"),
        ("asl", "needle"),
        ("fastkv@3", "needle"),
        ("fastkv@10", "needle"),
    ]
    asl = rows[3]
    assert (asl["n"], asl["score"]) == (4, 0.625)
    assert (asl["low"], asl["high"]) == wilson(0.625, 4)
    assert asl["work"] == pytest.approx(0.6)
    assert asl["layers"] == {"4": 2, "6": 1, "none": 1}
    assert report.layer_cell(asl) == "4 (4 to 6), 25% none"
    assert report.layer_cell(rows[0]) == "none"
    assert rows[2]["work"] == pytest.approx(0.128)


def test_unknown_work_is_no_number() -> None:
    rows = summary([record("full", None, 0, token_layers=None, num_layers=None)])
    assert rows[0]["work"] is None
    assert report.work_cell(rows[0]) == "-"


def test_tables() -> None:
    lines = report.table(summary(RECORDS), report.score_cell)
    assert lines[0] == ["policy", "budget", "needle", "key_value"]
    assert lines[1][:2] == ["full", "-"]
    assert lines[3] == ["asl", "64", "0.62 [0.22, 0.91]", "-"]
    assert len({len(line) for line in lines}) == 1
    assert "512 tokens" in report.text(summary(RECORDS))


def test_the_page_has_tables_and_a_plot(tmp_path: Path) -> None:
    rows = summary(RECORDS)
    page = report.markdown(RUN, rows, tmp_path / "images")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 3 * 2 + len(lines_of(rows)) * 2 + 3
    assert {line.count("|") for line in tables} == {5, 4}
    plot = tmp_path / "images" / "accuracy-512.png"
    assert "(images/accuracy-512.png)" in page
    before = plot.read_bytes()
    report.plot(rows, plot)
    assert plot.read_bytes() == before  # the same rows, the same file
    assert before.startswith(b"\x89PNG")
    # Other rows show.
    report.plot([row for row in rows if row["policy"] != "fastkv@10"], plot)
    assert plot.read_bytes() != before


def lines_of(rows: list[Any]) -> set[tuple[str, int | None]]:
    return {(row["policy"], row["budget"]) for row in rows}


def test_token_layers() -> None:
    report = {"selection_layer": 4, "kept_tokens": 100, "skipped_token_layers": 2000}
    assert token_layers("asl", 500, report, 10) == 3000
    assert token_layers("full", 500, {}, 10) == 5000
    assert token_layers("recency", 100, {}, 10) == 1000
    # N (r+1) + k L, which may be more than N L.
    assert token_layers("gemfilter", 500, report, 10) == 3500
    deep = {**report, "selection_layer": 9}
    assert token_layers("gemfilter", 500, deep, 10) == 6000
    unpruned = {"selection_layer": None, "kept_tokens": 500}
    assert token_layers("gemfilter", 500, unpruned, 10) == 5000
    assert token_layers("asl", 500, report, None) is None
