"""Each example prints what it should, asked of a server as the README starts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from asl_vllm_testing import ROOT, warm
from asl_vllm_testing.server import Server

EXAMPLES = ROOT / "examples"


def run_example(server: Server, *command: str) -> str:
    ran = subprocess.run(
        [*command, f"{server.url}/v1"],
        cwd=EXAMPLES,
        env={**os.environ, "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_example_of_the_openai_client(wheel_server: Server) -> None:
    printed = run_example(wheel_server, sys.executable, "openai_client.py")
    assert re.fullmatch(
        r"answer: 7 3 9 1\nkept 2\d\d of 16\d\d tokens a layer\n", printed
    )


def test_example_of_streaming(wheel_server: Server) -> None:
    printed = run_example(wheel_server, sys.executable, "streaming.py")
    answer, kept = printed.splitlines()
    assert answer.strip() == "4 0 8 2"
    assert re.fullmatch(r"kept (39|40)\d of 16\d\d tokens a layer", kept)


def test_example_of_langchain(wheel_server: Server) -> None:
    printed = run_example(
        wheel_server, sys.executable, "langchain_chat.py"
    ).splitlines()
    assert printed[0] == "red: 7 3 9 1"
    assert "'kept_tokens': 2" in printed[1]
    assert printed[2:] == ["silver: 4 0 8 2", "gold: 5 6 1 6"]


def test_example_of_a_rag_loop(wheel_server: Server) -> None:
    printed = run_example(wheel_server, sys.executable, "rag_loop.py")
    found = re.findall(
        r"^(\w+): ([\d ]+) \(read (\d+) of 16\d\d tokens, kept 2\d\d\)$", printed, re.M
    )
    assert [answer for _, answer, _ in found] == ["7 3 9 1", "4 0 8 2", "5 6 1 6"]
    # All of the document's whole blocks; the rest is the question and its window.
    assert all(int(read) >= 1568 for *_, read in found)


def test_example_of_javascript(wheel_server: Server) -> None:
    node = shutil.which("node") or _playwrights_node()
    printed = run_example(wheel_server, node, "client.mjs").splitlines()
    assert printed[0] == "answer: 5 6 1 6"
    assert re.fullmatch(r"kept: 2\d\d of 16\d\d", printed[1])
    assert printed[2] == "policy: asl"


def _playwrights_node() -> str:
    from playwright._impl._driver import compute_driver_executable

    return str(compute_driver_executable()[0])


def test_every_example_is_listed_and_run() -> None:
    text = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"\]\((\w+\.(?:py|mjs))\)", text))
    kinds = (".py", ".mjs")
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in kinds}
    tests = Path(__file__).read_text()
    for name in listed:
        assert f'"{name}"' in tests, f"{name} is run by no test"


def test_example_of_an_offline_batch() -> None:
    path = str(EXAMPLES / "offline_batch.py")
    code = f"import runpy; runpy.run_path({path!r}, run_name='__main__')"
    ran = warm.run([sys.executable, "-c", code], folder=EXAMPLES)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = re.findall(
        r"^kv_budget (\S+): ([\d ]+) \(kept (\d+) tokens\)$", ran.stdout, re.M
    )
    assert [(budget, answer) for budget, answer, _ in found] == [
        ("None", "7 3 9 1"),
        ("512", "7 3 9 1"),
        ("0.1", "7 3 9 1"),
    ]
    whole, pruned, share = (int(kept) for *_, kept in found)
    assert whole > 1600 and 480 < pruned <= 512 and 128 < share <= 161
