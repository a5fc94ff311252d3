"""What a replay says of a setting is what the policy does with the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from asl_vllm.config import AslConfig
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.direct import DirectModel, variant
from benchmarks.accuracy.prompts import Prompt
from benchmarks.accuracy.recording import Recording, file_name
from benchmarks.accuracy.replaying import main, replayed
from tests.accuracy.conftest import LENGTH, MODEL

KEPT = 75
RULE = {"window": 8, "l_min": 3, "l_obs": 2}


@pytest.mark.parametrize("reach", [1, 6])
@pytest.mark.parametrize("rule", [{"tau": 0.9}, {"tau": 0}, {"selection_layer": 1}])
def test_layer_and_work_are_those_of_a_prefill(
    prompt: Prompt, recording: Recording, rule: dict[str, float], reach: int
) -> None:
    options = {**RULE, **rule, "reach": reach}
    model = DirectModel(MODEL, LENGTH, 8)
    model.layers.begin_prompt(prompt.token_ids)
    made = variant(MODEL, 1, options, ["asl"])
    reply = model.reply(made, Cell("asl", "asl", KEPT), prompt.token_ids, 4)
    config = AslConfig.from_dict({"policy": "asl", **options})
    outcome = replayed(recording, config, KEPT)
    assert reply.kv_cache is not None
    assert outcome.layer == reply.kv_cache["selection_layer"]
    whole = len(prompt.token_ids) * 10
    skipped = reply.kv_cache["skipped_token_layers"]
    assert outcome.work == pytest.approx(1 - skipped / whole)


def test_what_is_read_falls_with_the_budget(
    recording: Recording,
) -> None:
    config = AslConfig.from_dict({"policy": "asl", **RULE, "tau": 0})
    whole = recording.asked.shape[-1]
    reads = [replayed(recording, config, kept).read for kept in (10, KEPT, whole)]
    assert reads[0] < 0.8 < reads[1]
    assert reads[2] == pytest.approx(1)


def test_a_window_that_was_not_recorded_is_refused(recording: Recording) -> None:
    with pytest.raises(ValueError, match="window, spans: got 9 and 1"):
        replayed(recording, AslConfig(policy="asl", window=9), KEPT)


def test_a_row_a_setting_and_a_column_a_kind(
    recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        recording.save(tmp_path / file_name("needle", LENGTH, index))
    options = '{"window": [8], "reach": [1, 6], "selection_layer": [4]}'
    main([str(tmp_path), "--share", "0.25", "--options", options])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| needle-300 (2) |")
    assert [line.split(" | ")[3] for line in lines[2:]] == ["1", "6"]
    assert all("; 4-4; " in line for line in lines[2:])
