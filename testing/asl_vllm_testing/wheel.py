"""The wheel, built from the sdist and installed where the checkout is not seen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from asl_vllm_testing import ROOT

_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "asl_vllm", "kernels", "server")
_SDIST = (
    "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
)


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and, made from what is in it by the README's command, the wheel."""
    source, unpacked = folder / "source", folder / "unpacked"
    for name in _SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    command = [sys.executable, "-c", _SDIST, str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    _pip(_shown("pip wheel"), inner, Path(sys.executable))
    (wheel,) = (inner / "dist").iterdir()
    return sdist, wheel


def install(wheel: Path, folder: Path, *more: Path) -> Path:
    """A new environment with the wheel, ``more`` and this environment's other packages.

    The wheel is one of `build`, installed by the README's command. This environment's
    packages are read through a path file, whose own path files are not: so the
    checkout, which is installed here by one, is not found.

    Returns:
        The environment's Python.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = sysconfig.get_path("purelib", "venv", vars={"base": str(folder)})
    Path(purelib, "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _pip(_shown("pip install"), wheel.parents[1], python)
    for package in more:
        _pip(f"pip install --no-deps '{package}'", folder, python)
    return python


def _shown(begin: str) -> str:
    """The one command of the README that begins so."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(rf"^{begin} .*$", text, re.M)
    return str(command)


def _pip(command: str, folder: Path, python: Path) -> None:
    """Runs a command in ``folder`` on the environment of ``python``, offline."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: none
    env = {**os.environ, **offline, "PATH": path, "PIP_PYTHON": str(python)}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
