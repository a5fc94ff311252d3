"""The Python files of another vLLM release, over the installed CPU extension.

vLLM's ordinary wheel is for GPUs, but its Python files are those of the CPU build. So
where a release has no CPU build its code still runs here, with the compiled operations
of the one that is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from asl_vllm_testing import ROOT

CACHE = ROOT / "build" / "vllm"
LARGEST = 3 << 20
"""Bytes of the largest file that is taken: what is larger is data for GPUs."""

GPU_ONLY = re.compile(
    r"torch|triton|nvidia|flashinfer|apache-tvm|tilelang|nvtx|fastsafetensors"
    r"|instanttensor|quack|tokenspeed|humming|pynv|numba",
    re.IGNORECASE,
)
"""Requirements of code for GPUs, or of which the CPU build has its own."""


class DownloadError(Exception):
    """A wheel could not be had; pip has said why."""


def installed_files() -> Path:
    """The folder in which the installed vLLM lies, without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def other_files(release: str) -> Path:
    """The folder in which ``vllm`` of that release lies; made once and kept.

    Raises:
        DownloadError: its wheel, or something new that it needs, could not be had.
    """
    extension = importlib.metadata.version("vllm")
    folder = CACHE / f"{release}-over-{extension}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        made = Path(temporary) / "files"
        wheels = Path(temporary) / "wheel"
        _pip("download", "--no-deps", "--dest", str(wheels), f"vllm=={release}")
        (wheel,) = wheels.glob("*.whl")
        needed = _unpack(wheel, made, release)
        _borrow_extension(made)
        if needed:
            _pip("install", "--no-deps", "--target", str(made), *needed)
        made.rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    if subprocess.run(command).returncode != 0:
        raise DownloadError(f"pip could not {' '.join(arguments)}")


def _unpack(wheel: Path, folder: Path, release: str) -> list[str]:
    """Unpacks what is Python; the requirements that nothing installed answers to.

    The metadata get the version's suffix ``+cpu``, by which vLLM knows its platform.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".so") and member.file_size < LARGEST:
                archive.extract(member, folder)
    metadata = folder / f"vllm-{release}.dist-info" / "METADATA"
    said, count = re.subn(
        r"(?m)^Version: .*$", f"Version: {release}+cpu", metadata.read_text(), count=1
    )
    assert count == 1
    metadata.write_text(said)
    requires = importlib.metadata.PathDistribution(metadata.parent).requires or ()
    return [line for line in requires if _is_missing(Requirement(line))]


def _is_missing(requirement: Requirement) -> bool:
    marker = requirement.marker
    if GPU_ONLY.match(requirement.name) or (
        marker is not None and not marker.evaluate({"extra": ""})
    ):
        return False
    try:
        importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def _borrow_extension(folder: Path) -> None:
    for library in (installed_files() / "vllm").glob("*.abi3.so"):
        shutil.copy2(library, folder / "vllm")
