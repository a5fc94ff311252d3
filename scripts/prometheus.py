"""Finds Prometheus and promtool, or fetches Debian's, for the tests of deploy/.

On the path, else in ``.venv/prometheus``, into which Debian's package (19 MB) is
unpacked where ``apt-get`` and ``dpkg-deb`` are; nothing is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv" / "prometheus"
FETCH_TIMEOUT_S = 120


class NoPrometheusError(Exception):
    """It is not here and could not be fetched; the message says why."""


def find_or_fetch(program: str) -> Path:
    """The path of ``prometheus`` or ``promtool``.

    Raises:
        NoPrometheusError: It is not on the path and Debian could not supply it.
    """
    found = shutil.which(program)
    if found:
        return Path(found)
    fetched = FOLDER / "usr" / "bin" / program
    if not fetched.is_file():
        _fetch()
    return fetched


def _fetch() -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NoPrometheusError("no Prometheus on the path, and no apt-get to fetch it")
    FOLDER.parent.mkdir(exist_ok=True)
    # In a folder beside it and renamed, so that an interrupted run leaves no half.
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        folder = Path(name)
        try:
            _run(folder, "apt-get", "download", "prometheus")
            (package,) = folder.glob("*.deb")
            _run(folder, "dpkg-deb", "-x", str(package), "done")
        except (subprocess.SubprocessError, OSError) as error:
            raise NoPrometheusError(
                f"Debian's package could not be had: {error}"
            ) from error
        shutil.rmtree(FOLDER, ignore_errors=True)
        (folder / "done").rename(FOLDER)


def _run(folder: Path, *command: str) -> None:
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S
    )
