"""Fixtures for tests that drive a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.random_model import write_random_model

RANDOM_SHAPE = {
    "layers": 8,
    "hidden": 96,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 160,
}


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GQA model of 8 layers whose ranks settle halfway."""
    return write_random_model(tmp_path_factory.mktemp("random_model"), **RANDOM_SHAPE)
