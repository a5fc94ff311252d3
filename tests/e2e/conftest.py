"""Fixtures for tests that drive a real engine."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from asl_vllm_testing import ROOT, SHIPPED_MODEL, harness, policy_package, wheel
from asl_vllm_testing.random_model import RANDOM_SHAPE, write_random_model
from asl_vllm_testing.server import Server, serve, serve_command
from asl_vllm_testing.settings import SERVER_OPTIONS
from tests.e2e.documents import shell_examples


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


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return wheel.build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def wheel_python(
    built_wheel: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    package = policy_package.write(folder / "policy")
    return wheel.install(built_wheel[1], folder / "environment", package)


@pytest.fixture(scope="session")
def wheel_server(
    wheel_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """As the README starts it, in an environment without the checkout."""
    _, (command, _), *_ = shell_examples(ROOT / "README.md")
    _, _, model, *options = shlex.split(command.replace("\\\n", " "))
    assert ROOT / model == SHIPPED_MODEL
    folder = tmp_path_factory.mktemp("elsewhere")
    started = [str(wheel_python), "-m", "vllm.entrypoints.cli.main", "serve"]
    started += [str(SHIPPED_MODEL), *options]
    log = folder / "log.txt"
    with serve_command(started, log, cwd=folder, PYTHONPATH="") as server:
        yield server


@pytest.fixture(autouse=True)
def blocks_are_whole() -> Iterator[None]:
    """After every test: no engine has lost, shared or kept a block it should not."""
    yield
    for host in harness.LIVE:
        host.check()
