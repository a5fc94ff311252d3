#!/usr/bin/env python3
"""Runs the tests on another vLLM release, without its CPU build and without a GPU.

    python scripts/try_vllm.py 0.34.0 [arguments of pytest]
    python scripts/try_vllm.py --supported
    python scripts/try_vllm.py --record

Downloads that release's ordinary wheel and lays its Python files over the installed
CPU extension; says which touch points have other code than in the newest supported
line; then runs the contract and engine tests and a few whole engines. Whether compiled
operations fit the release is not shown by it. docs/upgrading.md says what to do next.

``--supported`` tries every supported line that has no CPU build, as ``make test`` does;
``--record`` stores the fingerprints of the touch points of all supported lines.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from asl_vllm.engine.lines import LINES, UNTESTED_VARIABLE, Line
from asl_vllm_testing import ROOT
from asl_vllm_testing.other_vllm import (
    CACHE,
    DownloadError,
    installed_files,
    other_files,
)
from asl_vllm_testing.touch_points import code_of, fingerprints, store, symbols

OPTIONS = (
    "--continue-on-collection-errors",
    # In a worker, in which tests/conftest.py has engines start first.
    *("--numprocesses=1", "--dist=loadscope", "--no-loadscope-reorder"),
)
TESTS = ("tests/contract", "tests/engine")
ENGINES = (
    "tests/e2e/test_block_size.py",
    *(
        f"tests/e2e/test_service.py::{name}"
        for name in ("test_usage_of_streams", "test_kv_transfer_params_in_streams")
    ),
)
"""Whole engines that are run too; docs/upgrading.md says what else starts."""


def files_of(line: Line) -> Path:
    """Where the Python files of a supported line lie."""
    return installed_files() if line.cpu_build else other_files(line.release)


def print_changes(release: str, files: Path) -> None:
    """Says which touch points differ from those of the line before, with a diff."""
    before = [line for line in LINES if not line.has(release)][-1]
    old_files = files_of(before)
    changed: list[str] = []
    diff: list[str] = []
    for symbol in symbols():
        old, new = code_of(old_files, symbol), code_of(files, symbol)
        if old != new:
            changed.append(symbol)
            diff += difflib.unified_diff(
                old.splitlines(),
                new.splitlines(),
                f"{before.release}: {symbol}",
                f"{release}: {symbol}",
                lineterm="",
            )
    path = CACHE / f"{before.release}-to-{release}.diff"
    path.write_text("\n".join([*diff, ""]), encoding="utf-8")
    print(
        f"{len(changed)} of {len(symbols())} touch points have other code in vLLM "
        f"{release} than in {before.release}; read {path.relative_to(ROOT)}:"
    )
    for symbol in changed:
        print(f"  {symbol}")
    sys.stdout.flush()


def run_tests(files: Path, arguments: list[str]) -> int:
    """Runs pytest with that vLLM first on the path; its exit status."""
    ours = [ROOT, *(ROOT / name for name in ("kernels", "server", "testing"))]
    others = filter(None, [os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [files, *ours, *others])),
        UNTESTED_VARIABLE: "1",
        # What vLLM remembers of its models is of its own files.
        "VLLM_CACHE_ROOT": str(CACHE / "cache"),
        # Bytecode lies beside the files, which are kept.
        "PYTHONDONTWRITEBYTECODE": "",
    }
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def try_release(release: str, arguments: list[str]) -> int:
    """Lists what changed and runs the tests; the exit status."""
    files = other_files(release)
    print_changes(release, files)
    return run_tests(files, arguments or [*OPTIONS, *TESTS, *ENGINES])


def try_supported(arguments: list[str]) -> int:
    """Tries the supported lines that have no CPU build; the exit status."""
    if not importlib.metadata.version("vllm").endswith("+cpu"):
        print(
            "Lines without a CPU build were not tried: vLLM's GPU build is installed."
        )
        return 0
    tried = [line.release for line in LINES if not line.cpu_build]
    try:
        return max((try_release(release, arguments) for release in tried), default=0)
    except DownloadError as error:
        print(f"NOT TRIED: vLLM {' and '.join(tried)}. {error}. Is there a network?")
        # Of a run that is to prove something this is a failure.
        return 1 if os.environ.get("CI") else 0


def main() -> int:
    """The exit status of what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("release", nargs="?", help="such as 0.34.0")
    parser.add_argument("--supported", action="store_true")
    parser.add_argument("--record", action="store_true")
    asked, arguments = parser.parse_known_args()
    if asked.record:
        store({line.release: fingerprints(files_of(line)) for line in LINES})
        return 0
    if asked.supported:
        # What stands first after the option belongs to pytest too.
        return try_supported([*filter(None, [asked.release]), *arguments])
    if not asked.release:
        parser.error("name a release, such as 0.34.0, or pass --supported or --record")
    try:
        return try_release(asked.release, arguments)
    except DownloadError as error:
        print(f"NOT TRIED: vLLM {asked.release}. {error}. Is there a network?")
        return 1


if __name__ == "__main__":
    sys.exit(main())
