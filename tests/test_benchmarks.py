"""The benchmarks' results: what is kept from earlier runs, and the page."""

import json
from pathlib import Path

import pytest

from asl_vllm_testing import ROOT
from benchmarks import results_file
from benchmarks.__main__ import begun
from benchmarks.report import common_and_table, markdown, markdown_table

MACHINE = {
    "processor": "P",
    "cores": 2,
    "dtype": "float32",
    "scale": "full",
    "date": "2026-01-02",
    "versions": {"torch": "1"},
}
ROWS = {
    "losing": [
        {"what": "w", "tokens": 8, "budget": 4, "stock_s": 1.0, "ours_s": 2.0}
        | {"ratio": 2.0}
    ],
    "growth": [
        {"tokens": 8, "engine": "stock", "seconds": 1.0, "s_per_1k": 128.0}
        | {"ratio": 1.0}
    ],
}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"date": "2026-01-01"}, True),
        ({"scale": "quick"}, False),
        ({"versions": {"torch": "1", "asl_vllm": "0"}}, True),
        ({"versions": {"torch": "2"}}, False),
    ],
)
def test_earlier_results_stay_if_taken_alike(
    tmp_path: Path, changed: dict[str, object], kept: bool
) -> None:
    output = tmp_path / "results.json"
    nothing = {"machine": MACHINE, "experiments": {}, "earlier": {}}
    assert begun(output, MACHINE) == nothing
    output.write_text(json.dumps({"machine": MACHINE | changed, "experiments": ROWS}))
    assert begun(output, MACHINE)["machine"] == MACHINE
    results = begun(output, MACHINE)
    assert results["experiments"] == (ROWS if kept else {})
    assert results["earlier"].keys() == results["experiments"].keys()


def test_the_page_says_which_experiments_are_older(tmp_path: Path) -> None:
    earlier = {"losing": {"date": "2026-01-01", "asl_vllm": "0.1"}}
    results = {"machine": MACHINE, "experiments": ROWS, "earlier": earlier}
    page = markdown(results, tmp_path / "images", "images")
    assert page.count("Measured 2026-01-01 with asl_vllm 0.1.") == 1


def test_page_has_tables_in_order_and_plots(tmp_path: Path) -> None:
    results = {"machine": MACHINE, "experiments": ROWS}
    page = markdown(results, tmp_path / "images", "images")
    assert page.index("## Cost growth") < page.index("## Where pruning loses")
    assert "| w | 8 | 4 | 1 | 2 | 2 |" in page
    assert "P, 2 cores, float32, full sizes; torch 1; 2026-01-02." in page
    assert "(images/growth.png)" in page
    assert (tmp_path / "images" / "growth.png").stat().st_size
    assert not (tmp_path / "images" / "losing.png").exists()


def test_a_table_leaves_out_what_all_its_rows_share() -> None:
    rows = [ROWS["growth"][0] | {"engine": name} for name in ("stock", "asl")]
    rows[1]["ratio"] = 2.0
    common, table = common_and_table("growth", rows)
    assert common == "tokens 8, seconds 1, s_per_1k 128"
    assert table.splitlines()[::2] == ["| engine | ratio |", "| stock | 1 |"]
    common, table = common_and_table("growth", rows[:1])
    assert not common and "| 8 | stock | 1 | 128 | 1 |" in table


def test_results_are_written_a_row_a_line(tmp_path: Path) -> None:
    results = {"machine": MACHINE, "experiments": ROWS, "failed": 0}
    path = tmp_path / "results.json"
    results_file.write(path, results)
    text = path.read_text()
    assert json.loads(text) == results
    for row in (row for rows in ROWS.values() for row in rows):
        assert json.dumps(row) in text.splitlines()


@pytest.mark.parametrize(
    "path", (ROOT / "benchmarks" / "results").rglob("*.json"), ids=lambda p: p.stem
)
def test_results_in_the_repository_are_as_written(path: Path) -> None:
    text = path.read_text()
    assert text == results_file.text(json.loads(text)) + "\n"


def test_the_page_has_the_tables_of_the_results() -> None:
    folder = ROOT / "benchmarks/results"
    page = (ROOT / "docs/results.md").read_text()
    results = json.loads((folder / "cpu-epyc-2core.json").read_text())
    for name, rows in results["experiments"].items():
        assert common_and_table(name, rows)[1] in page, name
    rows = json.loads((folder / "kvpress.json").read_text())["rows"]
    assert markdown_table(tuple(rows[0]), rows) in page
