"""A recorded prompt, and processes that a run of the benchmark spawns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asl_vllm_testing import TINY_MODEL, warm
from benchmarks.accuracy.prompts import Prompt
from benchmarks.accuracy.recording import Recorder, Recording
from benchmarks.accuracy.tasks import TASKS

MODEL, LENGTH = str(TINY_MODEL), 300


@pytest.fixture
def forked() -> Iterator[None]:
    """Meanwhile they are forked from one that has imported vLLM."""
    with warm.spawning():
        yield


@pytest.fixture(scope="session")
def recorder() -> Recorder:
    return Recorder(MODEL, "none", "tuning", 0)


@pytest.fixture(scope="session")
def prompt(recorder: Recorder) -> Prompt:
    return recorder.maker.prompt(TASKS["needle"], LENGTH, 0)


@pytest.fixture(scope="session")
def recording(recorder: Recorder, prompt: Prompt) -> Recording:
    return recorder.record(prompt)
