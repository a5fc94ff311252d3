"""The commands of README.md and docs/api.md, run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from asl_vllm_testing.server import Server
from tests.e2e.documents import assert_within, names_in, run_shell, shell_examples

REPOSITORY = Path(__file__).parents[2]
README, API_DOCUMENT = REPOSITORY / "README.md", REPOSITORY / "docs" / "api.md"


def test_a_model_of_yours_is_served_by_the_same_options() -> None:
    """Nobody has the README's first model here; its options are the small one's."""
    (install, _), (start, _), *_ = shell_examples(README)
    *_, yours = install.splitlines()
    program, _, options = yours.partition(" Qwen/Qwen3-8B ")
    assert start.startswith(f"{program} ") and options == "--kv-policy asl"
    assert options in start


def test_the_commands_print_what_the_readme_says(wheel_server: Server) -> None:
    server = wheel_server  # that of the README's second block
    _, _, *commands = shell_examples(README)
    assert len(commands) == 3
    for command, expected in commands:
        assert "curl -s" in command
        printed = run_shell(command, server.url)
        assert expected is not None, "the README shows no reply to this"
        assert_within(json.loads(expected), json.loads(printed))
        # It shows the whole reply of a request, and a part of the stats.
        whole = "/v1/completions" in command
        assert not whole or names_in(json.loads(expected)) == names_in(
            json.loads(printed)
        )
    page = server.http.get("/kv")
    assert page.status_code == 200
    assert "vllm:asl_requests_total" in server.http.get("/metrics").text


def test_the_commands_of_the_api_print_what_it_says(wheel_server: Server) -> None:
    (setting, _), *commands = shell_examples(API_DOCUMENT)
    assert "PROMPT=" in setting
    assert len(commands) >= 6
    for command, expected in commands:
        assert "curl -s" in command
        printed = run_shell(setting + command, wheel_server.url)
        if expected is not None:
            assert_within(json.loads(expected), json.loads(printed))
        elif "-D -" in command:
            for header in ("policy", "selection-layer", "kept-tokens", "pruned-tokens"):
                assert f"x-kv-{header}" in printed.lower()
        else:
            *_, last, done = re.findall(r"^data: (.*)$", printed, re.M)
            assert done == "[DONE]"
            assert json.loads(last)["usage"]["kv_cache"]["budget_tokens"] == 102
