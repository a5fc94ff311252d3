"""A stage that fails or hangs costs the others nothing."""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.child import write_json
from benchmarks.gpu.runner import Run, earlier, write_archive
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.table import markdown_rows, page, remark, summary
from tests.gpu_run.fakes import FAKES

MACHINE = {
    "gpu": "Pretend 100",
    "driver": "1.2",
    "cuda": "13.0",
    "python": "3.12",
    "date": "2026-01-01",
    "versions": {"torch": "2.11"},
}
CHILD = (sys.executable, "-m", "tests.gpu_run.fakes")


def make_run(folder: Path, **options: Any) -> Run:
    given = {"seconds": 100.0, "machine": MACHINE, "child": CHILD, "jobs": 3}
    given["tell"] = lambda line: None
    return Run(folder / "output", folder / "work", **{**given, **options})


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("run")
    run = make_run(folder, pack=folder / "results.tar.gz")
    results = run.run(list(FAKES.values()))
    assert [result["stage"] for result in results] == list(FAKES)
    return folder, {result["stage"]: result for result in results}


def test_each_stage_has_its_own_end(finished: Any) -> None:
    _, results = finished
    assert {name: result["status"] for name, result in results.items()} == {
        "good": "passed",
        "wrong": "failed",
        "raising": "failed",
        "hanging": "timed out",
        "dying": "failed",
        "skipping": "skipped",
        "empty": "failed",
    }


def test_what_was_found_before_the_end_is_kept(finished: Any) -> None:
    _, results = finished
    assert results["good"]["rows"][1] == {"what": "a ratio", "ratio": 0.5, "dry": False}
    for name in ("raising", "hanging", "dying"):
        assert results[name]["rows"] == [{"what": "before", "ok": True}]
    assert "RuntimeError: the reason" in results["raising"]["log_tail"]
    assert "log_tail" not in results["good"]
    assert results["skipping"]["why"] == "no such tool"


def test_a_hanging_stage_ends_with_all_that_it_started(finished: Any) -> None:
    folder, results = finished
    assert 2 <= results["hanging"]["seconds"] < 20
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert not (folder / "work" / "hanging" / "outlived").exists()
        time.sleep(0.1)


def test_files_hold_what_was_returned(finished: Any) -> None:
    folder, results = finished
    for name, result in results.items():
        written = json.loads((folder / "output" / f"{name}.json").read_text())
        assert written == result
        assert written["machine"] == MACHINE
        assert (folder / "output" / "logs" / f"{name}.log").exists()
    with tarfile.open(folder / "results.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
    assert {f"{name}.json" for name in FAKES} <= packed
    assert not list(folder.rglob("*.part"))


def test_archives_are_whole_while_stages_write(tmp_path: Path) -> None:
    output = tmp_path / "output"
    (output / "logs").mkdir(parents=True)
    (output / "logs" / "done.log").write_text("all of it")
    (output / "killed.part").write_text("half of ")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            write_json(output / "written.json", {"rows": list(range(1000))})
            write_json(output / "deleted.json", {})
            (output / "deleted.json").unlink()

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        try:
            for _ in range(200):
                write_archive(output, tmp_path / "archive.tar.gz")
                with tarfile.open(tmp_path / "archive.tar.gz") as archive:
                    for member in archive.getmembers():
                        file = archive.extractfile(member)
                        assert file is not None
                        if member.name.endswith(".json"):
                            json.load(file)
        finally:
            stop.set()
        writing.result()
    write_archive(output, tmp_path / "archive.tar.gz")
    with tarfile.open(tmp_path / "archive.tar.gz") as archive:
        names = archive.getnames()
    assert names == ["output/logs/done.log", "output/written.json"]


def test_what_does_not_fit_any_more_is_not_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, seconds=10.0)
    # Half of 30 seconds are more than 10.
    (result,) = run.run([FAKES["good"]])
    assert result["status"] == "not run"
    assert "may take 30" in result["why"]
    assert not (tmp_path / "output" / "logs" / "good.log").exists()


def test_a_stage_gets_no_more_than_is_left(tmp_path: Path) -> None:
    patient = dataclasses.replace(FAKES["hanging"], seconds=4)
    (result,) = make_run(tmp_path, seconds=2.5).run([patient])
    assert result["status"] == "timed out"
    assert result["seconds"] < 3.9


def test_what_passed_before_is_found_again(finished: Any) -> None:
    folder, results = finished
    output = folder / "output"
    assert earlier(output, FAKES["good"], MACHINE) == results["good"]
    assert earlier(output, FAKES["wrong"], MACHINE) is None
    assert earlier(output, FAKES["good"], MACHINE | {"gpu": "Other"}) is None
    assert earlier(folder, FAKES["good"], MACHINE) is None


def test_tables(finished: Any) -> None:
    _, results = finished
    lines = summary(list(results.values())).splitlines()
    assert len(lines) == 1 + len(FAKES)
    assert "1 of 1 checks ok; 1 ratios to stock, 0.50 to 0.50" in lines[1]
    assert remark(results["wrong"]).startswith("1 of 2 checks ok")
    text = page(list(results.values()))
    assert "Pretend 100" in text
    assert all(f"## {name}\n" in text for name in FAKES)
    assert markdown_rows([{"a": 1}, {"b": "x|y"}]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | - |",
        "| - | x\\|y |",
    ]


def test_names_of_stages_are_names_of_files() -> None:
    for name, stage in STAGES.items():
        assert name == stage.name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert 0 < stage.seconds <= 540
