"""A process that has imported vLLM and done nothing else, and is forked when asked.

It has loaded no plugin and imported nothing of asl_vllm's, nor a route of vLLM's, so a
process forked from it loads, patches and reads its environment as a new one does; what
vLLM reads when it is imported (`warm.READ_LATE` are not such) is as the template found
it. A forked process begins with forking a template of its own, for those it spawns.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import util

from prometheus_client import values

PRELOADED = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
)
_HIGH = 1000
"""Above the numbers of all descriptors that are handed on."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Job:
    """What a forked process is to be."""

    environment: dict[str, str]
    descriptors: Sequence[int]
    """The numbers that the descriptors sent with it get, in their order."""
    arguments: Sequence[str]
    """Those of an interpreter: ``-m MODULE ...`` or ``-c CODE ...``."""
    session: bool = False
    """Whether the process leads a session of its own."""
    folder: str | None = None
    """Where it runs; None: where the template does."""

    def run(self) -> None:
        """Does it in this process."""
        kind, what, *arguments = self.arguments
        if kind == "-m":
            sys.argv = [what, *arguments]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *arguments]
            exec(what, sys.modules["__main__"].__dict__)


class Template:
    """How a process asks a template, which is a child of it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def fork(self, job: Job, descriptors: Sequence[int]) -> int:
        """The id of a new child of this process that does ``job``."""
        message = json.dumps(asdict(job)).encode()
        with self._lock, _adopting():
            head = len(message).to_bytes(8, "big")
            socket.send_fds(self._connection, [head], descriptors)
            self._connection.sendall(message)
            answer = self._connection.recv(8)
        if not answer:
            raise RuntimeError("the template process has ended; its output says why")
        return int.from_bytes(answer, "big")

    @contextlib.contextmanager
    def spawning(self) -> Iterator[None]:
        """Meanwhile multiprocessing's "spawn" in this process takes forks."""
        spawn = util.spawnv_passfds

        def spawnv_passfds(path: bytes, args: Sequence[str], passed: Sequence[int]):
            if args[-1] != "--multiprocessing-fork":
                return spawn(path, args, passed)
            numbers = (0, 1, 2, *sorted(map(int, passed)))
            begun = args.index("-c")
            return self.fork(Job(dict(os.environ), numbers, args[begun:]), numbers)

        util.spawnv_passfds = spawnv_passfds
        try:
            yield
        finally:
            util.spawnv_passfds = spawn


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Here this process becomes the parent of its grandchildren when theirs ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _next_job(connection: socket.socket) -> Job:
    """Answers requests until there are no more; returns in each forked process."""
    while True:
        head, received, _, _ = socket.recv_fds(connection, 8, 64)
        if not head:
            os._exit(0)
        message = b""
        while len(message) < int.from_bytes(head, "big"):
            message += connection.recv(1 << 20)
        # Twice, so that the one between ends and the asker is left as the parent.
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(writing, child.to_bytes(8, "big"))
                os._exit(0)
            for descriptor in (reading, writing):
                os.close(descriptor)
            connection.close()
            return _take_place(Job(**json.loads(message)), received)
        os.waitpid(between, 0)
        answer = os.read(reading, 8)
        for descriptor in (*received, reading, writing):
            os.close(descriptor)
        connection.sendall(answer)


def _take_place(job: Job, received: Sequence[int]) -> Job:
    """The job's descriptors, environment and session, in a process just forked."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in received]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, number in zip(high, job.descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if job.session:
        os.setsid()
    if job.folder is not None:
        os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(job.environment)
    path = job.environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [folder for folder in path if folder and folder not in sys.path]
    # By variables of the environment, when they are imported.
    values.ValueClass = values.get_value_class()
    importlib.import_module("vllm.logger")._configure_vllm_root_logger()
    return job


def main() -> None:
    """The template; and every process that is forked from it, from its birth on."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    for name in PRELOADED:
        # A vLLM of another line may lack one.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        # It finds where titles go beside the environment, as long as that is untouched.
        importlib.import_module("setproctitle").getproctitle()
    assert "asl_vllm" not in sys.modules, "a plugin was loaded"
    routes = [name for name in sys.modules if "api_router" in name]
    assert not routes, f"routes were made: {routes}"
    assert len(os.listdir("/proc/self/task")) == 1, "forking would lose threads"
    gc.freeze()
    gc.enable()
    # Ctrl-C is for the tests; this one ends when they do.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        job = _next_job(connection)
        ours, connection = socket.socketpair()
        if os.fork():
            break
        ours.close()
        for number in job.descriptors:
            if number > 2:
                os.close(number)
    connection.close()
    signal.signal(signal.SIGINT, on_interrupt)
    with Template(ours).spawning():
        job.run()


if __name__ == "__main__":
    main()
