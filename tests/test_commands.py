"""Every command in the documents: run by another test, or parsed by its own program.

A command of an unknown program fails, so that nobody documents one that nothing tries.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest

import asl_vllm
from asl_vllm.config import AslConfig
from asl_vllm_testing import ROOT
from asl_vllm_testing.commands import Command, commands_of

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / name / "README.md" for name in ("deploy", "examples")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ASKED = ("README.md", "docs/api.md")
"""Their calls of curl are sent to a server by tests/e2e/test_readme.py."""
INSTALLED = (
    "wheel --no-deps --wheel-dir dist .",  # testing/asl_vllm_testing/wheel.py
    "install dist/asl_vllm-*.whl",  # the same
    "install .",  # testing/asl_vllm_testing/policy_package.py
)
COMMANDS = list(dict.fromkeys(c for d in DOCUMENTS for c in commands_of(d)))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    monkeypatch.chdir(ROOT)
    words = list(command.words)
    while re.match(r"[A-Z_]+=", words[0]):
        setting = words.pop(0)
        if not words:
            assert setting.startswith("PROMPT="), "an assignment that nothing uses"
            return
    program = words[0].removeprefix(".venv/bin/")
    if program.startswith("scripts/"):
        program, words = "python", ["python", *words]
    assert program in PROGRAMS, f"no test knows {program}; add it to PROGRAMS"
    PROGRAMS[program](command, words[1:], monkeypatch)


# --- Programs ---


class ParsedError(Exception):
    """The arguments were understood; the program need not go on."""


def python(command: Command, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a module or script of ours parse its arguments, and stops it there."""
    module = words.pop(0) == "-m"
    name = words.pop(0) if module else command.words[-1 - len(words)]
    if name == "pytest":
        _paths(command, [word for word in words if not word.startswith("-")])
        return
    if name == "asl_server":
        vllm(command, ["serve", *words], monkeypatch)
        return
    path = ROOT / name
    if module:
        spec = importlib.util.find_spec(name)
        assert spec and spec.origin, f"no module {name}"
        package = spec.submodule_search_locations
        path = Path(package[0]) / "__main__.py" if package else Path(spec.origin)
    assert path.is_file()
    if not words:  # a program's name, in a sentence
        return
    assert "ArgumentParser(" in path.read_text("utf-8"), f"{name} takes no arguments"
    known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        known(self, *args, **kwargs)
        raise ParsedError

    def parse_args(self: Any, args: Any = None, namespace: Any = None) -> NoReturn:
        _, unknown = known(self, args, namespace)
        assert not unknown
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with pytest.raises(ParsedError):
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(path), run_name="__main__")


@cache
def serve_parser() -> argparse.ArgumentParser:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from asl_vllm import plugin
    from asl_vllm_testing.moved import make_arg_parser

    plugin.register()
    return make_arg_parser(FlexibleArgumentParser())


def vllm(command: Command, words: list[str], monkeypatch: Any) -> None:
    if words[1:]:
        assert words[0] == "serve"
        # The policy of docs/policies.md; tests/e2e/test_wheel.py asks a server for it.
        options = ["asl" if word == "newest" else word for word in words[1:]]
        if any(option.startswith("--help") for option in options):
            parser = type(serve_parser())  # whose class keeps the keyword
            monkeypatch.setattr(parser, "_search_keyword", None)
            with pytest.raises(SystemExit) as ended:
                serve_parser().parse_args(options)
            assert not ended.value.code
            return
        serve_parser().parse_args(options)


def offline(command: Command, *_: Any) -> None:
    (call,) = ast.parse(command.text).body
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    (keyword,) = call.value.keywords
    assert keyword.arg == "additional_config"
    AslConfig.from_dict(ast.literal_eval(keyword.value)["asl_vllm"])


def make(_: Command, words: list[str], __: Any) -> None:
    assert subprocess.run(["make", "-n", *words], capture_output=True).returncode == 0


def pip(_: Command, words: list[str], __: Any) -> None:
    assert " ".join(words) in INSTALLED


def curl(command: Command, *_: Any) -> None:
    assert command.document in ASKED


def _paths(command: Command, words: list[str], *_: Any) -> None:
    assert words
    for word in words:
        for path in word.partition("=")[2].split(":") if "=" in word else [word]:
            assert (ROOT / path.replace("$PWD", ".")).exists(), path


def docker(command: Command, words: list[str], monkeypatch: Any) -> None:
    """Nothing here runs it: its image is ours, and what follows is for our server."""
    action, image = words[0], f"asl-vllm:{asl_vllm.__version__}"
    if action == "compose":
        assert (ROOT / "deploy" / "compose" / "compose.yaml").exists()
        return
    assert action in ("build", "run") and image in words
    if action == "run":
        vllm(command, ["serve", *words[words.index(image) + 1 :]], monkeypatch)


def helm(_: Command, words: list[str], __: Any) -> None:
    """What it sets, the chart's schema allows; tests/deploy renders the chart."""
    install, _name, chart, *options = words
    values: dict[str, Any] = {}
    for flag, setting in zip(options[::2], options[1::2], strict=True):
        place, _, value = setting.partition("=")
        *outer, last = place.split(".")
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
        assert flag == "--set"
    assert install == "install"
    jsonschema.validate(
        values, json.loads((ROOT / chart / "values.schema.json").read_text())
    )


def kubectl(command: Command, words: list[str], _: Any) -> None:
    """The secret that the chart is told of in the same document."""
    assert words[:3] == ["create", "secret", "generic"]
    assert f"apiKey.secretName={words[3]}" in (ROOT / command.document).read_text()


def cp(_: Command, words: list[str], __: Any) -> None:
    assert (ROOT / "deploy" / "compose" / words[0]).exists()


PROGRAMS: dict[str, Callable[[Command, list[str], Any], None]] = {
    "python": python,
    "python3": python,
    "vllm": vllm,
    "LLM": offline,
    "make": make,
    "pip": pip,
    "curl": curl,
    "cd": _paths,
    "export": _paths,
    ".ci/run": lambda command, *_: _paths(command, [".ci/run"]),
    "docker": docker,
    "helm": helm,
    "kubectl": kubectl,
    "cp": cp,
}


# --- That commands are found ---


def test_commands_are_found_in_every_form() -> None:
    texts = [command.text for command in COMMANDS]
    for start in (
        "vllm serve examples/deep_retriever ",  # fenced
        "curl -s localhost:8000/v1/kv/stats",
        "make demo ",  # indented
        ".venv/bin/python scripts/sizing.py",  # after a prompt
        "python -m benchmarks.landing",  # in a line
    ):
        assert any(text.startswith(start) for text in texts), start


def test_an_unknown_option_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (
        "python -m benchmarks.gpu --no-such-option",
        "python scripts/sizing.py --no-such-option",
        "vllm serve MODEL --no-such-option",
        "make no-such-target",
        "curl localhost",
    ):
        command = Command("docs/x.md", text, tuple(text.split()))
        with (
            monkeypatch.context() as inside,
            pytest.raises((AssertionError, SystemExit)),
        ):
            test_command(command, inside)
