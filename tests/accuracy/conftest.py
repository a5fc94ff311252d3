"""Processes that a run of the benchmark spawns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asl_vllm_testing import warm


@pytest.fixture
def forked() -> Iterator[None]:
    """Meanwhile they are forked from one that has imported vLLM."""
    with warm.spawning():
        yield
