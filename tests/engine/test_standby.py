"""Beside a vLLM of no supported line: as if we were not there, but for a policy.

Each in a fresh process, with that version's name in the metadata that are found first.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pytest

from asl_vllm.engine.lines import UNTESTED_VARIABLE, described
from asl_vllm_testing import ROOT, warm
from asl_vllm_testing.vllm_configs import TINY_MODEL

OTHER, SUPPORTED = "0.34.0+cpu", "0.33.1+cpu"
ASL = ("--kv-policy", "asl")
REFUSAL = f"supports vLLM {described()}, found vllm {OTHER}"

_PROCESSOR = "import vllm.v1.engine.input_processor as module\n"
DRIFTS = {
    "signature": _PROCESSOR + "module.InputProcessor.process_inputs = lambda: None",
    "method": _PROCESSOR + "del module.InputProcessor.process_inputs",
    "class": _PROCESSOR + "del module.InputProcessor",
}
OWN_OPTION = """
add = EngineArgs.add_cli_args
def add_cli_args(parser):
    parser.add_argument("--kv-budget")
    return add(parser)
EngineArgs.add_cli_args = staticmethod(add_cli_args)
"""
NO_CONFIG = """
create = EngineArgs.create_engine_config
EngineArgs.create_engine_config = lambda engine_args: create(engine_args)
"""
NO_REPORTS = """
from vllm.v1.engine.output_processor import RequestState
del RequestState.make_request_output
"""


class Answer(NamedTuple):
    """What became of a start."""

    status: int
    said: str


def scenario(*options: str, version: str = OTHER, before: str = "", **env: str) -> Any:
    engine = ["--model", str(TINY_MODEL), "--max-model-len", "256"]
    return {
        "version": version,
        "options": [*engine, "--dtype", "float32", *options],
        "before": before,
        "env": env,
    }


SCENARIOS = {
    "off": scenario(),
    "on": scenario(*ASL),
    "offline": scenario("--additional-config", '{"asl_vllm": {"policy": "asl"}}'),
    "untested": scenario(*ASL, ASL_VLLM_UNTESTED="1"),
    "own option": scenario("--kv-budget", "vllms", before=OWN_OPTION),
    "no config": scenario(before=NO_CONFIG),
    "no reports": scenario(*ASL, version=SUPPORTED, before=NO_REPORTS),
    "supported": scenario(*ASL, version=SUPPORTED),
    **{
        f"{drift} {'on' if options else 'off'}": scenario(
            *options, version=SUPPORTED, before=before
        )
        for drift, before in DRIFTS.items()
        for options in (ASL, ())
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    folder = tmp_path_factory.mktemp("starts")
    scenarios = json.dumps(list(SCENARIOS.values()))
    ran = warm.run(
        [sys.executable, "-m", "tests.engine.starting", str(folder), scenarios],
        folder=ROOT,
        **{UNTESTED_VARIABLE: "0"},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    answered = json.loads(ran.stdout.splitlines()[-1])
    return {name: Answer(*a) for name, a in zip(SCENARIOS, answered, strict=True)}


def assert_stock(answer: Answer) -> None:
    assert answer.status == 0, answer.said
    assert "worker vllm.v1.worker.cpu_worker.CPUWorker" in answer.said
    assert "fields False" in answer.said


def assert_pruning(answer: Answer) -> None:
    assert answer.status == 0, answer.said
    assert "worker asl_vllm.engine.worker.worker.AslCpuWorker" in answer.said
    assert "fields True" in answer.said


def test_without_a_policy_it_starts_as_if_we_were_not_there(
    answers: dict[str, Answer],
) -> None:
    assert_stock(answers["off"])
    assert "asl_vllm" not in answers["off"].said


@pytest.mark.parametrize("way", ["on", "offline"])
def test_a_policy_is_refused(answers: dict[str, Answer], way: str) -> None:
    status, said = answers[way]
    assert status != 0
    assert REFUSAL in said.splitlines()[-1]
    assert "--kv-policy none" in said.splitlines()[-1]


def test_it_may_be_tried(answers: dict[str, Answer]) -> None:
    assert_pruning(answers["untested"])
    assert f"{REFUSAL}. It works with it untested" in answers["untested"].said


def test_a_supported_line_says_nothing(answers: dict[str, Answer]) -> None:
    """The counterpart of all others here."""
    assert_pruning(answers["supported"])
    assert "supports vLLM" not in answers["supported"].said


@pytest.mark.parametrize("drift", DRIFTS)
def test_one_patch_that_does_not_fit_is_no_better(
    answers: dict[str, Answer], drift: str
) -> None:
    """It is of the last to be made: none is."""
    assert_stock(answers[f"{drift} off"])
    status, said = answers[f"{drift} on"]
    assert status != 0
    assert "InputProcessor" in said.splitlines()[-1]
    assert "--kv-policy asl" in said.splitlines()[-1]


def test_patches_made_later_are_checked_before_the_engine_starts(
    answers: dict[str, Answer],
) -> None:
    status, said = answers["no reports"]
    assert status != 0
    assert "make_request_output is gone from vLLM" in said.splitlines()[-1]
    assert "--kv-policy asl" in said.splitlines()[-1]


def test_an_option_of_vllms_own_is_left_to_it(answers: dict[str, Answer]) -> None:
    assert_stock(answers["own option"])
    assert "--kv-budget is vLLM's own option here" in answers["own option"].said


def test_nothing_is_done_where_policies_cannot_be_refused(
    answers: dict[str, Answer],
) -> None:
    assert_stock(answers["no config"])
    assert "asl_vllm does nothing here" in answers["no config"].said
