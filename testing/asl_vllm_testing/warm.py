"""New Python processes that need not import vLLM: forked, where they would be started.

A process spends some ten seconds on importing torch and vLLM, and a server is three
processes or more. What is about starting itself starts for real.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from asl_vllm_testing.template import Job, Template

READ_LATE = frozenset(
    {
        "ASL_VLLM_UNTESTED",
        "PYTHONPATH",
        "VLLM_API_KEY",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_LOGGING_LEVEL",
        "VLLM_PLUGINS",
        "VLLM_SERVER_DEV_MODE",
    }
)
"""Variables that hold in a fork: read after vLLM was imported, or by the template."""


class Process:
    """A forked child, with what tests use of a ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def _template() -> Template:
    """This process's, made when it is first needed; ends with it."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "asl_vllm_testing.template", str(theirs.fileno())]
    # Imports begin no threads then, which a fork would lose.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=alone)
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return Template(ours)


def can_run(command: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Whether a fork is as good as ``command`` with these variables set."""
    python, kind, *_ = command
    return (
        python == sys.executable
        and kind in ("-m", "-c")
        and READ_LATE.issuperset(variables)
    )


def start(
    command: Sequence[str],
    output: IO[bytes],
    environment: Mapping[str, str],
    *,
    errors: IO[bytes] | None = None,
    folder: Path | None = None,
) -> Process:
    """Starts ``python -m ...`` or ``-c ...`` in a session of its own.

    Its errors go where its output goes unless ``errors`` is given.
    """
    job = Job(
        dict(environment),
        (0, 1, 2),
        command[1:],
        session=True,
        folder=None if folder is None else str(folder),
    )
    sinks = (output.fileno(), (errors or output).fileno())
    with open(os.devnull, "rb") as nothing:
        return Process(_template().fork(job, (nothing.fileno(), *sinks)))


def run(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    seconds: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` says of such a command, its output captured as text.

    ``variables`` are added to this process's.

    Raises:
        subprocess.TimeoutExpired: it ran for longer, and was killed.
    """
    assert can_run(command, variables), "it would not be as a new process is"
    environment = {**os.environ, **variables}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start(command, output, environment, errors=errors, folder=folder)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        said = []
        for sink in (output, errors):
            sink.seek(0)
            said.append(sink.read().decode())
    return subprocess.CompletedProcess(command, status, *said)


def spawning() -> AbstractContextManager[None]:
    """Meanwhile multiprocessing's "spawn" in this process takes forks."""
    return _template().spawning()
