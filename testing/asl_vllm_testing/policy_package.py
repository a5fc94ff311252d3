"""The package of a policy that docs/policies.md shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from asl_vllm_testing import ROOT

GUIDE = ROOT / "docs" / "policies.md"


def shown(language: str) -> str:
    """The guide's one block of code in a language."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.S)
    return code


def write(folder: Path) -> Path:
    """The package's sources, from nothing but the guide's two files."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(shown("toml"))
    (folder / "newest_policy.py").write_text(shown("python"))
    return folder


def install(folder: Path) -> Path:
    """Installs the package below ``folder``.

    Returns:
        The folder to put on ``PYTHONPATH``.
    """
    source, target = write(folder / "source"), folder / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*command, str(source)], check=True)
    return target
