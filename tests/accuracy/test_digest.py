"""The digest of a study, and the tables of documents that quote it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.accuracy import digest, report
from benchmarks.accuracy.summary import summary
from tests.accuracy.records import RECORDS, record

ROOT = Path(__file__).parents[2]
STUDY = [
    ("deep_retriever", "1/8"),
    ("deep_retriever-small_budgets", "1/32,1/16"),
    ("deep_retriever-early_layers", "1/8"),
    ("tiny_retriever", "1/8"),
]


def test_at_one_budget() -> None:
    assert digest.at_budget(summary(RECORDS), Fraction(1, 8)) == [
        ["tokens", "kept", "policy", "needle", "key_value", "work"],
        ["512", "64", "full", "100", "100", "1.00"],
        ["512", "64", "random", "0", "-", "0.13"],
        ["512", "64", "asl", "62.5", "-", "0.60"],
        ["512", "64", "fastkv@3", "100", "-", "1.00"],
        ["512", "64", "fastkv@10", "100", "-", "1.00"],
    ]


def test_other_budgets_are_left_out() -> None:
    lines = digest.at_budget(summary(RECORDS), 32)
    assert [line[2] for line in lines] == ["policy", "full"]


def test_work_from_least_to_most_and_unknown() -> None:
    rows = summary(
        [
            record("asl", 64, 0, token_layers=4000),
            record("asl", 64, 0, token_layers=2000, task="key_value"),
            record("snapkv", 64, 0, token_layers=None, num_layers=None),
        ]
    )
    lines = digest.at_budget(rows, 64)
    assert [line[-1] for line in lines[1:]] == ["0.40 to 0.80", "-"]


def test_from_the_worst_to_the_best_budget() -> None:
    rows = summary(
        [
            record("asl", 64, 0, score=1.0),
            record("asl", 128, 0, score=0.25),
            record("asl", 128, 0, score=0.5, length=1024),
            record("asl", 64, 0, score=0.0, task="key_value"),
            record("snapkv", 128, 0, score=0.5, length=1024),
        ]
    )
    assert digest.over_budgets(rows, "needle") == [
        ["policy, needle", "512", "1024"],
        ["asl", "25 to 100", "50"],
        ["snapkv", "-", "50"],
    ]


def test_mean_layers() -> None:
    assert digest.mean_layers(summary(RECORDS)) == [
        ["tokens", "kept", "needle", "key_value"],
        ["512", "64", "4.7, 1 none", "-"],
    ]


def test_documents_quote_the_digest(capsys: pytest.CaptureFixture[str]) -> None:
    for name, budgets in STUDY:
        path = ROOT / "benchmarks" / "results" / f"accuracy-{name}.json"
        digest.main([str(path), "--budgets", budgets])
    printed = set(capsys.readouterr().out.splitlines())
    text = (ROOT / "docs" / "accuracy.md").read_text()
    _, study = text.split("\n## Appendix: the study on small models\n")
    quoted = [line for line in study.splitlines() if line.startswith("| ")]
    assert len(quoted) > 5
    assert [line for line in quoted if line not in printed] == []


def test_documents_quote_the_real_model() -> None:
    path = ROOT / "benchmarks" / "results" / "accuracy-smollm2.json"
    rows = json.loads(path.read_text())["cells"]
    text = (ROOT / "docs" / "accuracy.md").read_text()
    assert report.markdown_table(report.table(rows, report.score_cell)) in text
    assert {row["n"] for row in rows} == {
        int(text.split(" test prompts")[0].split()[-1])
    }


def test_documents_quote_reach_on_the_real_model() -> None:
    path = ROOT / "benchmarks" / "results" / "accuracy-smollm2-reach.json"
    rows = json.loads(path.read_text())["cells"]
    text = (ROOT / "docs" / "accuracy.md").read_text()
    table = report.markdown_table(report.table(rows, report.score_cell))
    before, _ = text.split(table)
    assert {row["n"] for row in rows} == {
        int(before.split(" of these prompts")[0].split()[-1])
    }
    for row in rows:
        assert f"{row['work']:.2f}" in " ".join(before.splitlines()[-3:])


def test_scores_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "results.json", tmp_path / "images" / "plot.png"
    rows = summary(RECORDS)
    path.write_text(json.dumps({"cells": rows}))
    digest.main([str(path), "--plot", str(plot)])
    want = report.markdown_table(report.table(rows, report.score_cell))
    assert capsys.readouterr().out == want + "\n"
    assert plot.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({"cells": [*rows, {**rows[0], "length": 1024}]}))
    with pytest.raises(SystemExit):
        digest.main([str(path), "--plot", str(plot)])
    assert "several lengths" in capsys.readouterr().err


def test_a_bad_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        digest.main(["results.json", "--budgets", "0"])
    assert "allowed" in capsys.readouterr().err
