"""The wheel, built from the sdist and installed where the checkout is not seen."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from asl_vllm_testing import ROOT

_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "asl_vllm", "kernels", "server")
_BUILD = "import sys; from setuptools import build_meta as b; print(b.{}(sys.argv[1]))"


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and, made from what is in it, the wheel."""
    source, unpacked = folder / "source", folder / "unpacked"
    for name in _SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    sdist = _built("build_sdist", source, folder)
    shutil.unpack_archive(sdist, unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    return sdist, _built("build_wheel", inner, folder)


def install(wheel: Path, folder: Path, *more: Path) -> Path:
    """A new environment with the wheel, ``more`` and this environment's other packages.

    This environment's packages are read through a path file, whose own path files are
    not: so the checkout, which is installed here by one, is not found.

    Returns:
        The environment's Python.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = sysconfig.get_path("purelib", "venv", vars={"base": str(folder)})
    Path(purelib, "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    command += ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, str(wheel), *map(str, more)], check=True)
    return python


def _built(hook: str, source: Path, target: Path) -> Path:
    """The file that a hook of the build backend makes of ``source``."""
    command = [sys.executable, "-c", _BUILD.format(hook), str(target)]
    done = subprocess.run(
        command, cwd=source, check=True, capture_output=True, text=True
    )
    return target / done.stdout.splitlines()[-1]
