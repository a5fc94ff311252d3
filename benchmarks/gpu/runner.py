"""Runs stages, each in a process group of its own, within the time there is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.gpu.child import PART, RUNNING, write_json
from benchmarks.gpu.stage import Stage

Result = dict[str, Any]
"""A stage's JSON: stage, what, status, seconds, rows, machine, and why or log_tail."""
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOT_RUN = "not run"
TAIL_CHARACTERS = 3000


@dataclass
class Run:
    """One run of several stages."""

    output: Path
    work: Path
    seconds: float
    """For all stages together."""
    machine: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    dry: bool = False
    jobs: int = 1
    """Stages at once, of those that are not timed."""
    pack: Path | None = None
    """A file that always holds the newest output, as a tar archive."""
    child: tuple[str, ...] = (sys.executable, "-m", "benchmarks.gpu.child")
    tell: Callable[[str], None] = print
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Stage]) -> list[Result]:
        """Runs first what is not timed, then the rest one by one; a result each."""
        done: dict[str, Result] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            untimed = [stage for stage in stages if not stage.timed]
            for result in pool.map(self._one, untimed):
                done[result["stage"]] = result
        for stage in stages:
            if stage.timed:
                done[stage.name] = self._one(stage)
        return [done[stage.name] for stage in stages]

    def _one(self, stage: Stage) -> Result:
        left = self._end - time.monotonic()
        # With less than half of what it may take a stage would hardly come to an end.
        if left < stage.seconds / 2:
            why = f"{max(0, left):.0f} s left of the run; it may take {stage.seconds}"
            result: Result = {"stage": stage.name, "what": stage.what}
            result |= {"status": NOT_RUN}
            result |= {"seconds": 0.0, "rows": [], "why": why}
        else:
            result = self._run(stage, min(left, stage.seconds))
        self._keep(stage, result)
        return result

    def _run(self, stage: Stage, limit: float) -> Result:
        path = self.output / f"{stage.name}.json"
        path.unlink(missing_ok=True)
        log = self.output / "logs" / f"{stage.name}.log"
        work = self.work / stage.name
        work.mkdir(exist_ok=True)
        command = [*self.child, stage.name, "--output", str(path), "--work", str(work)]
        if self.dry:
            command.append("--dry")
        began = time.monotonic()
        late = False
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(self.env) | dict(stage.env),
                start_new_session=True,
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                end_group(process)
        result = self._written(path, stage)
        result["seconds"] = round(time.monotonic() - began, 1)
        if late:
            result |= {"status": TIMED_OUT, "why": f"not done after {limit:.0f} s"}
        elif result["status"] == RUNNING or (
            process.returncode and result["status"] == PASSED
        ):
            why = f"its process ended with status {process.returncode}"
            result |= {"status": FAILED, "why": why}
        if result["status"] in (FAILED, TIMED_OUT):
            text = log.read_text(errors="replace")
            result["log_tail"] = text[-TAIL_CHARACTERS:]
        return result

    @staticmethod
    def _written(path: Path, stage: Stage) -> Result:
        try:
            found: Result = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            found = {"stage": stage.name, "what": stage.what, "status": RUNNING}
            found["rows"] = []
        return found

    def _keep(self, stage: Stage, result: Result) -> None:
        result["machine"] = dict(self.machine)
        with self._lock:
            write_json(self.output / f"{stage.name}.json", result)
            why = f": {result['why']}" if result.get("why") else ""
            seconds = f"{result['seconds']:.0f} s"
            self.tell(f"{stage.name}: {result['status']}, {seconds}{why}")
            if self.pack is not None:
                write_archive(self.output, self.pack)


def write_archive(folder: Path, archive: Path) -> None:
    """Packs a folder's files, replacing the archive in one step.

    Stages may write there meanwhile: what they have not finished is left out.
    """
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or path.suffix == PART:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # of an earlier run, deleted as its stage begins again
            member = tarfile.TarInfo(str(folder.name / path.relative_to(folder)))
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))
    os.replace(part, archive)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def earlier(output: Path, stage: Stage, machine: Mapping[str, Any]) -> Result | None:
    """What an earlier run has of a stage, if it passed there on the same machine."""
    path = output / f"{stage.name}.json"
    if not path.is_file():
        return None
    found: Result = json.loads(path.read_text())
    was = found.get("machine", {})
    same = all(was.get(key) == machine.get(key) for key in ("gpu", "versions"))
    return found if same and found["status"] == PASSED else None
