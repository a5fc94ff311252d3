"""scripts/demo.py: its prompt, its table, and how it handles a server."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from asl_vllm_testing import scripts

SCRIPT = scripts.SCRIPTS / "demo.py"


@pytest.fixture(scope="module")
def demo():
    return scripts.load("demo")


# --- prompt ---


def test_prompt_holds_the_fact_once_and_midway(demo):
    prompt = demo.build_prompt()
    assert prompt.count(demo.FACT) == 1
    assert prompt.count("red") == 2  # the fact and the question
    assert 0.45 < prompt.index(demo.FACT) / len(prompt) < 0.55
    assert prompt.endswith(demo.QUESTION)


def test_prompt_has_about_2000_tokens_all_in_the_vocabulary(demo):
    tokenizer = Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))
    encoded = tokenizer.encode(demo.build_prompt())
    assert 1900 <= len(encoded.ids) <= 2100
    assert tokenizer.token_to_id("<unk>") not in encoded.ids
    assert max(b for b in demo.BUDGETS if b) < len(encoded.ids)


def test_warm_up_prompt_shares_no_block_with_the_other(demo):
    prompt = demo.build_prompt().split()
    warm_up = demo.build_prompt(first=1).split()
    assert len(prompt) == len(warm_up)
    assert prompt[: demo.BLOCK_SIZE - 1] != warm_up[: demo.BLOCK_SIZE - 1]


def test_question_is_answered_by_the_fact(demo):
    assert f"{demo.QUESTION.removeprefix('question : ')} {demo.ANSWER} ." == demo.FACT


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 7 3 9 1", True),
        ("7 3 9 1 . the", True),
        (" 7 3 9", False),
        (" 7 3 9 2", False),
        ("", False),
    ],
)
def test_is_right(demo, text, right):
    assert demo.is_right(text) is right


def test_policy_config_is_valid_and_refused_budget_below_minimum(demo):
    from asl_vllm.config import AslConfig

    config = AslConfig.from_dict({"policy": "asl", **demo.POLICY_CONFIG})
    assert config.window + demo.BLOCK_SIZE > demo.REFUSED_BUDGET
    assert all(b >= config.window + demo.BLOCK_SIZE for b in demo.BUDGETS if b)


# --- table ---


def row(demo, **changes):
    fields = {
        "budget": 128,
        "text": " 7 3 9 1",
        "prompt_tokens": 2008,
        "report": {
            "budget_tokens": 128,
            "selection_layer": 4,
            "kept_tokens": 120,
            "pruned_tokens": 1888,
            "freed_blocks": 59,
        },
        "milliseconds": 41.6,
    }
    return demo.Row(**{**fields, **changes})


def test_row_of_a_pruned_prompt(demo):
    cells = row(demo).cells()
    assert cells == ["128", "7 3 9 1", "yes", "4", "120", "4", "42"]
    assert row(demo).as_expected


def test_row_of_a_whole_prompt(demo):
    whole = row(demo, budget=None, report=None)
    assert whole.cells() == ["null", "7 3 9 1", "yes", "63", "2008", "-", "42"]
    assert whole.as_expected


def test_row_without_a_selection_layer(demo):
    report = {"kept_tokens": 120, "freed_blocks": 59}
    assert row(demo, report=report).cells()[5] == "none"


def test_row_not_as_expected(demo):
    assert row(demo, text=" 7 3").cells()[2] == "NO"
    assert not row(demo, text=" 7 3").as_expected
    assert not row(demo, report=None).as_expected  # asked for, not pruned


def test_table_lines_up(demo):
    rows = [row(demo, budget=None, report=None), row(demo), row(demo, text=" 7 . x")]
    lines = demo.render_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert [cell.strip() for cell in lines[0].split("|")] == list(demo.HEADINGS)
    bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in lines}
    assert len(bars) == 1


# --- server ---


def test_serve_command_is_vllm_of_this_environment(demo):
    command = demo.serve_command(1234)
    assert Path(command[0]).parent == Path(sys.executable).parent
    assert command[1:3] == ["serve", str(demo.MODEL)]
    assert command[-1] == "1234"
    assert demo.MODEL.is_dir()


def test_environment_keeps_what_is_set_and_adds_cpu_settings_only_there(demo):
    env = demo.serve_environment({"HF_HUB_OFFLINE": "0", "A": "b"}, cpu_build=False)
    assert env["HF_HUB_OFFLINE"] == "0"
    assert env["A"] == "b"
    assert not any(name.startswith("VLLM_CPU") for name in env)
    env = demo.serve_environment({"VLLM_CPU_KVCACHE_SPACE": "4"}, cpu_build=True)
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


FAKE_SERVER = """
import http.server, os, signal, subprocess, sys
mode, port = sys.argv[1], int(sys.argv[2])
print("INFO Resolved architecture: Fake", flush=True)
print("INFO CPU KV cache size: 1,024 tokens, more", flush=True)
if mode == "fails":
    sys.exit("no such thing")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake_server(demo, mode):
    port = demo.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", FAKE_SERVER, mode, str(port)]
    return demo.Server(command, os.environ, url), url


def gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead; whoever inherited it has not looked yet
            return True
        time.sleep(0.05)
    return False


def child_pid(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/health", timeout=5) as reply:
        return int(reply.read())


@pytest.mark.parametrize("mode", ["well-behaved", "stubborn"])
def test_server_is_gone_with_its_children(demo, mode, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.5)
    server, url = fake_server(demo, mode)
    with server:
        child = child_pid(url)
        pid = server._process.pid
    assert gone(pid)
    assert gone(child)
    assert "ready" in capsys.readouterr().out


def test_server_is_gone_after_an_interrupt(demo):
    server, url = fake_server(demo, "well-behaved")
    with pytest.raises(KeyboardInterrupt), server:
        child = child_pid(url)
        raise KeyboardInterrupt
    assert gone(child)


def test_failing_start_shows_the_log(demo):
    server, _ = fake_server(demo, "fails")
    with pytest.raises(demo.DemoError, match=r"(?s)no such thing.*status 1"), server:
        pytest.fail("the server is not up")


def test_start_that_takes_too_long(demo, monkeypatch):
    monkeypatch.setattr(demo, "START_TIMEOUT_S", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    server = demo.Server(command, os.environ, "http://127.0.0.1:9")
    with pytest.raises(demo.DemoError, match="not ready"), server:
        pytest.fail("the server is not up")
    assert gone(server._process.pid)


def test_progress_tells_stages_of_the_log(demo, capsys):
    progress = demo.Progress()
    progress.tick()
    progress.read("x\n(Worker pid=1) INFO [m.py:1] Starting to load model tiny...\n")
    progress.tick()
    progress.tick()
    progress.read("INFO GPU KV cache size: 419,424 tokens, Maximum concurrency\n")
    progress.tick()
    shown = [line.split(" s  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        "starting the server",
        "loading the model",
        "sizing the KV pool: 419,424 tokens",
    ]


def test_sigterm_stops_the_server(demo, tmp_path):
    """Against the script itself, with a server that never gets ready."""
    pid_file = tmp_path / "pid"
    code = f"""
import importlib.util, os, pathlib, sys
spec = importlib.util.spec_from_file_location("asl_demo", {str(SCRIPT)!r})
demo = importlib.util.module_from_spec(spec)
sys.modules["asl_demo"] = demo
spec.loader.exec_module(demo)
slow = "import os, time; open(" + repr({str(pid_file)!r}) + ", 'w').write("
slow += "str(os.getpid()) + ' '); time.sleep(600)"
demo.serve_command = lambda port: [sys.executable, "-c", slow, "-"]
sys.exit(demo.main())
"""
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text().endswith(" ")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server_pid = int(pid_file.read_text())
        script.send_signal(signal.SIGTERM)
        assert script.wait(30) == 128 + signal.SIGTERM
        assert gone(server_pid)
    finally:
        script.kill()
        script.wait()
