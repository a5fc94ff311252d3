"""Trying another vLLM release: what is unpacked, what is missing, what is said."""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path
from typing import Any

import pytest

from asl_vllm.engine.lines import LINES
from asl_vllm_testing import other_vllm
from asl_vllm_testing.other_vllm import DownloadError
from asl_vllm_testing.scripts import load

METADATA = """Metadata-Version: 2.1
Name: vllm
Version: 0.34.0
Requires-Dist: pytest>=9
Requires-Dist: no-such-package>=1
Requires-Dist: no-such-extra; extra == "more"
Requires-Dist: flashinfer-nowhere==9
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-0.34.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "number = 1\n")
        archive.writestr("vllm/_C.abi3.so", "for a GPU")
        archive.writestr("vllm/data.bin", bytes(other_vllm.LARGEST))
        archive.writestr("vllm-0.34.0.dist-info/METADATA", METADATA)
    return path


def test_python_files_are_laid_over_the_extension(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> None:
        asked.append(arguments)
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            folder.mkdir()
            wheel.rename(folder / wheel.name)

    monkeypatch.setattr(other_vllm, "_pip", pip)
    monkeypatch.setattr(other_vllm, "CACHE", tmp_path / "cache")
    folder = other_vllm.other_files("0.34.0")
    assert (folder / "vllm" / "__init__.py").read_text() == "number = 1\n"
    assert not (folder / "vllm" / "data.bin").exists()
    extension = folder / "vllm" / "_C.abi3.so"
    assert extension.stat().st_size > 1000, "it is the installed one"
    (info,) = importlib.metadata.distributions(path=[str(folder)])
    assert info.version == "0.34.0+cpu"
    assert [arguments[0] for arguments in asked] == ["download", "install"]
    assert asked[1][-1] == "no-such-package>=1", "nothing for GPUs, nothing optional"
    assert other_vllm.other_files("0.34.0") == folder
    assert len(asked) == 2, "it is made once"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, where nothing can be downloaded."""
    module = load("try_vllm")

    def fail(release: str) -> Path:
        raise DownloadError(f"pip could not download vllm=={release}")

    monkeypatch.setattr(module, "other_files", fail)
    return module


@pytest.mark.parametrize(
    ("arguments", "ci", "status"),
    [(["--supported"], "", 0), (["--supported"], "true", 1), (["0.34.0"], "", 1)],
)
def test_a_missing_network_is_said(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    ci: str,
    status: int,
) -> None:
    """And is a failure where the run is to prove something."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("sys.argv", ["try_vllm.py", *arguments])
    if all(line.cpu_build for line in LINES) and arguments == ["--supported"]:
        pytest.skip("every supported line has a CPU build")
    assert script.main() == status
    said = capsys.readouterr().out
    assert said.startswith("NOT TRIED: vLLM 0.3")
    assert "Is there a network?" in said
