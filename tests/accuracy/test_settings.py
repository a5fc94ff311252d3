"""What settings would have chosen is what asl chooses with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asl_vllm_testing import TINY_MODEL
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.direct import DirectModel, variant
from benchmarks.accuracy.prompts import PromptMaker
from benchmarks.accuracy.settings import (
    Setting,
    Tracer,
    main,
    observed,
    outcome,
    settings,
    work,
)
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tokens import HubTokenizer

MODEL = str(TINY_MODEL)
LENGTH, BUDGET = 300, 75
PLACES = [("needle", 0), ("needle", 1), ("key_value", 0), ("key_value", 1)]


@pytest.fixture(scope="module")
def traces() -> list[dict[str, Any]]:
    tracer = Tracer(MODEL, LENGTH, 32)
    return [tracer.traces(task, LENGTH, index, BUDGET) for task, index in PLACES]


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("l_min", [1, 4])
@pytest.mark.parametrize("l_obs", [2, 4])
def test_a_setting_chooses_and_scores_as_asl_does(
    traces: list[dict[str, Any]], l_obs: int, l_min: int, tau: float
) -> None:
    model = DirectModel(MODEL, LENGTH, 8)
    maker = PromptMaker(HubTokenizer(MODEL, "none"), split="tuning", seed=0)
    options = {"window": 8, "l_obs": l_obs, "l_min": l_min, "tau": tau}
    made = variant(MODEL, 32, options, ["asl"])
    setting = Setting(l_obs, l_min, tau)
    scores, spent = [], []
    for (name, index), trace in zip(PLACES, traces, strict=True):
        prompt = maker.prompt(TASKS[name], LENGTH, index)
        model.layers.begin_prompt(prompt.token_ids)
        cell = Cell("asl", "asl", BUDGET)
        reply = model.reply(made, cell, prompt.token_ids, TASKS[name].max_tokens)
        assert reply.kv_cache is not None
        assert setting.layer(trace) == reply.kv_cache["selection_layer"]
        assert trace["kept"] == reply.kv_cache["kept_tokens"]
        scores.append(TASKS[name].score(reply.text, prompt.answers))
        whole = len(prompt.token_ids) * 10
        spent.append(1 - reply.kv_cache["skipped_token_layers"] / whole)
    found = outcome(setting, traces)
    assert found["score"] == pytest.approx(sum(scores) / len(scores))
    assert found["work"] == pytest.approx(sum(spent) / len(spent))


def test_a_layer_late_enough_answers(traces: list[dict[str, Any]]) -> None:
    for trace in traces:
        assert len(trace["right"]) == 11
        assert trace["right"][6] == trace["right"][-1] == 1
        assert work(trace, 9) == work(trace, None) == 1
        assert work(trace, 4) == pytest.approx(
            0.5 + 0.5 * trace["kept"] / 297, abs=0.01
        )


def test_tables(
    traces: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "traces.jsonl"
    output.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    assert main([MODEL, "--output", str(output), "--render"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| task | " + " | ".join(map(str, range(10))) + " | none |"
    assert lines[4].startswith("| needle | ")
    assert lines[4].count("|") == 13
    assert any(line.startswith("| 2 | 3 | 0.3 | 100 |") for line in lines)


@pytest.mark.usefixtures("forked")
def test_traces_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "traces.jsonl"
    arguments = [MODEL, "--tasks", "needle", "--lengths", "300", "--n", "2"]
    arguments += ["--budgets", "1/4", "--concurrency", "1", "--output", str(output)]
    assert main(arguments) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(t["index"], t["budget"]) for t in found] == [(0, 75), (1, 75)]
    assert "| needle | " in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [
        ["--lengths", "4097"],
        ["--lengths", "300", "--budgets", "39"],
        ["--lengths", "300", "--budgets", "300"],
        ["--lengths", "300", "--budgets", "75", "1/4"],
        ["--budgets", "none"],
    ],
)
def test_what_cannot_be_is_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "traces.jsonl"
    assert main([MODEL, *given, "--output", str(output)]) == 2
    assert "got" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("num_layers", [2, 3, 4, 10, 32])
def test_settings_of_any_depth_have_their_variances(num_layers: int) -> None:
    assert {setting.l_obs for setting in settings(num_layers)} == set(
        observed(num_layers)
    )
    assert min(observed(num_layers)) >= 2
