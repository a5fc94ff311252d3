"""The shell examples of a Markdown document, and what it says they print."""

from __future__ import annotations

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any


def shell_examples(document: Path) -> list[tuple[str, str | None]]:
    """(command, JSON that follows it) of each shell block."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", document.read_text("utf-8"), re.S)
    return [
        (text, following[1] if following[0] == "json" else None)
        for (kind, text), following in pairwise([*blocks, ("", "")])
        if kind == "sh"
    ]


def run_shell(script: str, url: str) -> str:
    """What a script prints when the server is at ``url``."""
    script = script.replace("http://", "").replace("localhost:8000", url)
    ran = subprocess.run(
        ["bash", "-euc", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def names_in(value: Any) -> set[str]:
    """The names of all fields of a reply, with the way to each."""
    if isinstance(value, dict):
        inner = {f"{name}.{way}" for name in value for way in names_in(value[name])}
        return {*value, *inner}
    if isinstance(value, list):
        return {way for one in value for way in names_in(one)}
    return set()


def assert_within(part: Any, whole: Any) -> None:
    """Every key and item of ``part`` is in ``whole``; "..." stands for any value."""
    if part == "...":
        assert whole
    elif isinstance(part, dict):
        assert isinstance(whole, dict)
        for key in part:
            assert key in whole
            assert_within(part[key], whole[key])
    elif isinstance(part, list):
        assert len(part) == len(whole)
        for one, other in zip(part, whole, strict=True):
            assert_within(one, other)
    else:
        assert part == whole, (part, whole)
        assert type(part) is type(whole)
