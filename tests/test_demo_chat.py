"""scripts/demo_chat.py: its columns, its request and its server; `make` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from asl_vllm_testing import scripts


@pytest.fixture
def demo_chat(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(scripts.SCRIPTS))
    return scripts.load("demo_chat")


def reply(prompt_tokens: int, report: dict[str, Any] | None) -> Any:
    message = SimpleNamespace(content=" They are works. ")
    usage = SimpleNamespace(
        prompt_tokens=prompt_tokens,
        model_extra={"kv_cache": report} if report else None,
    )
    return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)


def client(answer: Any) -> tuple[Any, list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []

    def create(**request: Any) -> Any:
        asked.append(request)
        return answer

    completions = SimpleNamespace(create=create)
    return SimpleNamespace(chat=SimpleNamespace(completions=completions)), asked


def test_a_question_is_asked_with_its_budget(demo_chat: ModuleType) -> None:
    report = {"kept_tokens": 250, "freed_blocks": 60, "selection_layer": 17}
    fake, asked = client(reply(2170, report))
    answer = demo_chat.ask(fake, "A text.", 256)
    assert asked[0]["extra_body"] == {"kv_budget": 256}
    content = asked[0]["messages"][0]["content"]
    assert content.startswith("A text.") and content.endswith(demo_chat.QUESTION)
    assert answer.lines(40)[:5] == [
        "kv_budget 256",
        f"time {answer.seconds:.1f} s",
        "KV blocks held 8",
        "tokens kept 250 of 2170",
        "selection layer 17",
    ]
    fake, _ = client(reply(2170, None))
    assert demo_chat.ask(fake, "A text.", None).lines(40)[2:5] == [
        "KV blocks held 68",
        "tokens kept 2170 of 2170",
        "selection layer -",
    ]


def test_answers_stand_side_by_side(demo_chat: ModuleType) -> None:
    common = {"prompt_tokens": 64, "freed_blocks": 0, "seconds": 1.0}
    answers = [
        demo_chat.Answer(budget=None, text="one two three four", kept_tokens=64,
                         selection_layer=None, **common),
        demo_chat.Answer(budget=40, text="five", kept_tokens=40,
                         selection_layer=None, **common),
    ]  # fmt: skip
    lines = demo_chat.side_by_side(answers, width=24).splitlines()
    assert lines[0].split(" | ")[1] == "kv_budget 40"
    assert lines[4] == f"{'selection layer -'.ljust(24)} | selection layer none"
    assert lines[6] == f"{'one two three four'.ljust(24)} | five"


def test_the_text_is_long_and_holds_the_answer(demo_chat: ModuleType) -> None:
    text = demo_chat.TEXT.read_text()
    assert '"Derivative Works" shall mean' in text
    assert len(text.split()) > 1000
    assert max(b for b in demo_chat.BUDGETS if b) < len(text.split())
    command = demo_chat.serve_command(Path("/model"), 1)
    assert command[command.index("--kv-policy") + 1] == "asl"
    assert command[0] == str(Path(sys.executable).parent / "vllm")


def test_make_runs_it() -> None:
    makefile = (scripts.SCRIPTS.parent / "Makefile").read_text()
    assert "\ndemo-chat: setup ##" in makefile
    assert "scripts/demo_chat.py" in makefile
