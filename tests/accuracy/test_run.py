"""The whole tool against a server without a model: what it asks, errors, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.__main__ import main, parse_args, replies_path, servers
from benchmarks.accuracy.cells import CellError, cells, parse_budget
from benchmarks.accuracy.client import Served
from benchmarks.accuracy.run import MOST_FAILURES
from tests.accuracy.fakes import FakeServer, completion, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


def ask(server: FakeServer, output: Path, *options: str, **named: str) -> int:
    given = {
        "base-url": server.url,
        "tasks": "needle",
        "lengths": "400",
        "budgets": "1/4",
        "policies": "full,asl,recency,random",
        "n": "3",
        "concurrency": "4",
        "output": str(output),
        **{key.replace("_", "-"): value for key, value in named.items()},
    }
    pairs = [part for key, value in given.items() for part in (f"--{key}", value)]
    return main([*pairs, *options])


def records(output: Path) -> list[dict[str, Any]]:
    lines = replies_path(output).read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def refuse(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 500, {"error": {"message": "out of order"}}


def test_a_run(server: FakeServer, tmp_path: Path) -> None:
    output, page = tmp_path / "out.json", tmp_path / "page.md"
    assert ask(server, output, page=str(page)) == 0
    assert len(server.asked) == 12
    assert all(body["model"] == "tiny" for body in server.asked)
    assert all(body["max_tokens"] == 4 for body in server.asked)
    assert all(body["temperature"] == 0 for body in server.asked)
    pruned = [body for body in server.asked if body["kv_policy"] == "asl"]
    assert [body["kv_budget"] for body in pruned] == [100] * 3
    assert {body["kv_reuse"] for body in pruned} == {"none"}
    plain = [body for body in server.asked if body["kv_policy"] == "none"]
    assert {body["kv_budget"] for body in plain} == {None}
    # 396 tokens less 10 blocks of 32, the most of 100 that frees whole blocks.
    assert sorted(len(body["prompt"]) for body in plain) == [76] * 6 + [396] * 3
    assert {tuple(b["prompt"]) for b in pruned} <= {tuple(b["prompt"]) for b in plain}

    results = json.loads(output.read_text())
    assert results["failed"] == 0
    assert results["run"]["rule"] == {"window": 8, "tau": 0.3}
    rows = {row["policy"]: row for row in results["cells"]}
    assert list(rows) == ["full", "recency", "random", "asl"]
    assert rows["full"]["score"] == rows["asl"]["score"] == 1
    assert rows["asl"]["layers"] == {"4": 3}
    assert rows["asl"]["work"] == pytest.approx(1 - 5 * 296 / 3960)
    assert rows["recency"]["work"] == pytest.approx(76 / 396)
    assert rows["recency"]["kept_tokens"] == 76
    assert page.read_text().count("\n| asl | 100 |") == 3
    assert (tmp_path / "images" / "accuracy-400.png").exists()
    output.unlink()
    assert ask(server, output, "--render", page=str(page)) == 0
    assert json.loads(output.read_text()) == results
    assert len(server.asked) == 12


def test_what_failed_is_asked_again(server: FakeServer, tmp_path: Path) -> None:
    output = tmp_path / "out.json"

    def sometimes(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return refuse(body) if body["kv_policy"] == "asl" else server.solve(body)

    server.handle = sometimes
    assert ask(server, output) == 1
    assert json.loads(output.read_text())["failed"] == 3
    assert len(server.asked) == 12 and len(records(output)) == 9
    server.handle = server.solve
    assert ask(server, output, "--resume") == 0
    assert len(server.asked) == 15 and len(records(output)) == 12
    assert {body["kv_policy"] for body in server.asked[12:]} == {"asl"}
    # More prompts: those that are there are not asked again.
    assert ask(server, output, "--resume", n="4") == 0
    assert len(server.asked) == 19


def test_an_interrupted_line_is_asked_again(server: FakeServer, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert ask(server, output, policies="full") == 0
    path = replies_path(output)
    path.write_text(path.read_text()[:-5])
    assert ask(server, output, "--resume", policies="full") == 0
    assert len(server.asked) == 4 and len(records(output)) == 3


def test_replies_of_other_prompts_are_kept_apart(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    assert ask(server, output, policies="full") == 0
    assert ask(server, output, policies="full") == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert ask(server, output, "--resume", policies="full", split="tuning") == 2
    assert "other prompts: split was ['test'], is ['tuning']" in capsys.readouterr().err
    assert server.policies
    config = {**server.policies["config"], "tau": 0.5}
    server.policies = {**server.policies, "config": config}
    assert ask(server, output, "--resume", policies="full") == 2
    assert "rule was" in capsys.readouterr().err
    assert len(server.asked) == 3


def test_a_fixed_layer_is_a_policy_of_its_own(
    server: FakeServer, tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    assert ask(server, output, policies="full,fastkv") == 0
    assert server.policies
    config = {**server.policies["config"], "selection_layer": 3}
    server.policies = {**server.policies, "config": config}
    assert ask(server, output, "--resume", policies="full,fastkv,snapkv") == 0
    assert [r["policy"] for r in records(output)].count("fastkv@3") == 3
    assert {r["policy"] for r in records(output)} == {
        *("full", "fastkv", "fastkv@3", "snapkv")
    }
    assert len(server.asked) == 12


def test_a_server_that_is_down_is_given_up(server: FakeServer, tmp_path: Path) -> None:
    server.handle = refuse
    assert ask(server, tmp_path / "out.json", n="50") == 1
    assert MOST_FAILURES <= len(server.asked) < MOST_FAILURES + 4


@pytest.mark.parametrize(
    ("usage", "policy", "message"),
    [
        ({}, None, "kv_transfer_params: got None; expected a report of asl"),
        ({}, "snapkv", "expected a report of asl"),
        ({"prompt_tokens": 7}, "asl", "counts 7 prompt tokens of 396 sent"),
    ],
)
def test_replies_that_cannot_be_right_count_as_failed(
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    usage: dict[str, Any],
    policy: str | None,
    message: str,
) -> None:
    common = {
        "completion_tokens": 4,
        "total_tokens": 0,
        "kv_cache": {"kept_tokens": 76},
    }

    def handle(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        own = {"prompt_tokens": len(body["prompt"]), **common, **usage}
        return 200, completion("1 2 3 4", own, {"policy": policy} if policy else None)

    server.handle = handle
    output = tmp_path / "out.json"
    assert ask(server, output, policies="asl", n="1") == 1
    assert message in capsys.readouterr().err
    assert records(output) == []


def test_any_server_can_be_asked_without_a_budget(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.policies = None
    assert ask(server, tmp_path / "no.json") == 2
    assert "the others need one with --kv-policy" in capsys.readouterr().err
    output = tmp_path / "out.json"
    assert ask(server, output, policies="full,random") == 0
    assert all("kv_policy" not in body for body in server.asked)
    rows = json.loads(output.read_text())["cells"]
    assert [row["work"] for row in rows] == [None, None]
    assert [row["kept_tokens"] for row in rows] == [396, 100]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "5000"}, "got 5000; allowed: up to the server's max_model_len"),
        ({"lengths": "12"}, "got 12, too short for the task needle"),
        ({"model": "huge"}, "model: got 'huge'; allowed: tiny"),
        ({"policies": "full,best"}, "policies: got 'best'; allowed with this server"),
        ({"base_url": "http://127.0.0.1:9"}, "Connection error"),
    ],
)
def test_what_cannot_be_is_refused_before_asking(
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr("benchmarks.accuracy.client.RETRIES", 0)
    assert ask(server, tmp_path / "out.json", **options) == 2
    assert message in capsys.readouterr().err
    assert not server.asked


def test_budgets() -> None:
    assert parse_budget("2048") == 2048
    assert parse_budget("1/8") == parse_budget("0.125") == Fraction(1, 8)
    for text in ("0", "1", "-3", "3/2", "half", "1/0", ""):
        with pytest.raises(CellError, match=r"allowed: tokens, or a share"):
            parse_budget(text)


def test_budgets_that_prune_nothing_or_too_much_are_left_out(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = Served("m", "m", ("none", "asl"), minimum_budget=40)
    budgets = [Fraction(1, 32), Fraction(1, 2), 40, 512, 600]
    found = list(cells(["full", "asl", "random"], budgets, 512, served))
    assert [(cell.policy, cell.budget) for cell in found] == [
        ("full", None),
        *(("asl", 256), ("asl", 40)),
        *(("random", 256), ("random", 40)),
    ]
    assert ask(server, tmp_path / "out.json", budgets="1/32,1/2", n="1") == 0
    assert "budget 1/32 is left out: 12 tokens, not in 40 to 399" in (
        capsys.readouterr().out
    )


def test_servers_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "benchmarks.accuracy.__main__.started",
        lambda model, options, config, log: calls.append((model, options, config)),
    )
    args = parse_args(
        [
            *("--start", "MODEL", "--serve-args", "--dtype float32"),
            *("--policy-config", '{"window": 8}', "--fastkv-layers", "2,5"),
            *("--policies", "full,fastkv,asl", "--output", str(tmp_path / "o.json")),
        ]
    )
    policies = [names for _, names in servers(args)]
    assert policies == [["full", "asl"], ["fastkv"], ["fastkv"]]
    dtype = ["--dtype", "float32"]
    assert calls == [
        ("MODEL", dtype, {"window": 8}),
        ("MODEL", dtype, {"window": 8, "selection_layer": 2}),
        ("MODEL", dtype, {"window": 8, "selection_layer": 5}),
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--tasks", "niah"],
        ["--n", "0"],
        ["--budgets", "1.5"],
        ["--lengths", "4k"],
        ["--fastkv-layers", "3"],
        ["--start", "MODEL", "--fastkv-layers", "3", "--policies", "full"],
        ["--block-size", "16"],
        ["--device", "cuda"],
        ["--pool-kernels", "7"],
        ["--policy-config", "{"],
    ],
)
def test_bad_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([*options, "--output", "out.json"])
