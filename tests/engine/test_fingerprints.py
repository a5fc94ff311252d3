"""Stored fingerprints of touch points, and how they are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from asl_vllm.engine import lines
from asl_vllm_testing import touch_points
from asl_vllm_testing.other_vllm import installed_files
from asl_vllm_testing.touch_points import code_of

RECORD = "run scripts/try_vllm.py --record"
MODULE = """
class Base:
    def inherited(self):
        return 1
class Owner(Base):
    x: int = 3
    @staticmethod
    def method(): return 2
"""


def test_every_supported_release_has_fingerprints() -> None:
    stored = touch_points.stored()
    assert list(stored) == [line.release for line in lines.LINES], RECORD
    for prints in stored.values():
        assert list(prints) == touch_points.symbols(), RECORD


def test_they_are_those_of_the_installed_release() -> None:
    found = lines.installed()
    assert found is not None
    public, _, _ = found[1].partition("+")
    stored = touch_points.stored()
    if public not in stored:
        pytest.skip(f"none are stored of vLLM {public}")
    assert touch_points.fingerprints(installed_files()) == stored[public], RECORD


def files(folder: Path, module: str) -> Path:
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("from .module import *\n")
    (folder / "vllm" / "module.py").write_text(module)
    return folder


@pytest.mark.parametrize(
    ("symbol", "code"),
    [
        ("Owner.method", ["@staticmethod", "def method(): return 2"]),
        ("Owner.inherited", ["def inherited(self):", "return 1"]),
        ("Owner.x", ["x: int = 3"]),
        ("Owner.gone", []),
        ("gone", []),
        ("module", MODULE.replace("    ", "").split("\n")[1:-1]),
    ],
)
def test_code_is_found(tmp_path: Path, symbol: str, code: list[str]) -> None:
    found = code_of(files(tmp_path, MODULE), f"vllm.{symbol}")
    assert [line.strip() for line in found.splitlines()] == code


def test_a_fingerprint_is_of_code_only(tmp_path: Path) -> None:
    before = code_of(files(tmp_path / "a", MODULE), "vllm.module")
    said = MODULE.replace("(Base):\n", '(Base):\n    """Says."""\n\n    # More.\n')
    assert code_of(files(tmp_path / "b", said), "vllm.module") == before
    other = MODULE.replace("return 2", "return 3")
    assert code_of(files(tmp_path / "c", other), "vllm.module") != before
