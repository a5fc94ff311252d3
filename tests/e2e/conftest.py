"""Fixtures for tests that drive a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asl_vllm_testing import harness
from asl_vllm_testing.random_model import RANDOM_SHAPE, write_random_model
from asl_vllm_testing.server import Server, serve
from asl_vllm_testing.settings import SERVER_OPTIONS


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GQA model of 8 layers whose ranks settle halfway."""
    return write_random_model(tmp_path_factory.mktemp("random_model"), **RANDOM_SHAPE)


@pytest.fixture(scope="session")
def pruning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a policy, for all tests that only talk to it."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(log, *SERVER_OPTIONS) as server:
        yield server


@pytest.fixture(autouse=True)
def blocks_are_whole() -> Iterator[None]:
    """After every test: no engine has lost, shared or kept a block it should not."""
    yield
    for host in harness.LIVE:
        host.check()
