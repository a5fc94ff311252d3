"""Looking at vLLM: signatures, sources and what our code imports of it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).parents[2] / "asl_vllm" / "engine"
PLUGIN = ENGINE.parent / "plugin.py"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters, in order."""
    return tuple(inspect.signature(function).parameters)


def source(thing: Any) -> str:
    """Source code without comments and docstrings, formatted as `ast` does."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and isinstance(node, ast.stmt):
            first = body[0] if body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value = ast.Constant("")
    return ast.unparse(tree)


def in_order(text: str, *parts: str) -> bool:
    """Whether the parts occur one after the other."""
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def engine_modules() -> list[Path]:
    """The files that may import vLLM."""
    return [*sorted(ENGINE.rglob("*.py")), PLUGIN]


def vllm_symbols(path: Path) -> Iterator[str]:
    """Dotted names of vLLM that a file imports, anywhere, or names in a string."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Paths that vLLM resolves; prose has blanks.
            names = [node.value] if " " not in node.value else []
        else:
            continue
        yield from (name for name in names if name.startswith("vllm."))
