"""Makes vLLM and asl_vllm importable for the stages' processes.

vLLM is what is installed, or what a bundle for hosts without a network unpacks: a
folder with an ``unpack.py`` that fills the folder named by the variable ``VLD``, to
whose ``site`` it adds vLLM's dependencies. asl_vllm is this working tree. vLLM finds it
by package metadata, which is written beside where nothing is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OFFLINE = {
    # No FlashInfer and no DeepGEMM in a bundle.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}
COMMON = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    # Engines run inside the stages' processes, where their insides can be looked at.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def environment(work: Path, bundle: Path | None) -> dict[str, str]:
    """The variables that stages run with; writes to ``work`` what they point to.

    Raises:
        FileNotFoundError: ``bundle`` is none.
        subprocess.CalledProcessError: unpacking failed; its output is on the terminal.
    """
    folders = ("kernels", "server", "testing")
    paths = [ROOT, *(ROOT / name for name in folders), write_metadata(work / "plugin")]
    given = dict(COMMON)
    if bundle is not None:
        unpacked = unpack(bundle, work / "vllm")
        paths += [unpacked, unpacked / "site"]
        given |= OFFLINE
    path = [str(p) for p in paths]
    if before := os.environ.get("PYTHONPATH"):
        path.append(before)
    # What the caller has set wins, but for the path.
    return given | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path)}


def unpack(bundle: Path, target: Path) -> Path:
    """Unpacks a bundle, once; returns the folder that holds ``vllm``."""
    script = bundle / "unpack.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"--bundle: got {bundle}, which has no unpack.py; wanted the folder of a "
            "bundle (docs/gpu.md), or no --bundle where vLLM is installed."
        )
    done = target / ".unpacked"
    if not done.exists():
        # Elsewhere than the bundle, which may be read-only.
        variables = os.environ | {"VLD": str(target)}
        command = [sys.executable, str(script.resolve())]
        subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
        # Once, on all cores, instead of in each stage's process.
        compiling = [sys.executable, "-m", "compileall", "-q", "-j", "0", str(target)]
        subprocess.run(compiling, check=False, stdout=subprocess.DEVNULL)
        done.touch()
    return target


def write_metadata(folder: Path) -> Path:
    """The plugin's entry points and version, as an installed package's."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    scope: dict[str, str] = {}
    exec((ROOT / "asl_vllm" / "_version.py").read_text(), scope)
    own = folder / f"asl_vllm-{scope['__version__']}.dist-info"
    own.mkdir(parents=True, exist_ok=True)
    (own / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\n"
        f"Version: {scope['__version__']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {target}" for name, target in points.items()]
    (own / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
