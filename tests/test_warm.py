"""The process that servers of tests are forked from."""

from __future__ import annotations

import subprocess
from typing import Any
from unittest.mock import Mock

import pytest

from asl_vllm_testing import warm


def test_its_imports_begin_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever starts it: `make fuzz` sets nothing, as tests do."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    started: dict[str, Any] = {}

    def popen(command: list[str], **options: Any) -> Mock:
        started.update(options)
        return Mock()

    monkeypatch.setattr(subprocess, "Popen", popen)
    warm._template.__wrapped__()
    assert started["env"]["OMP_NUM_THREADS"] == "1"
