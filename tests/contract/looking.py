"""Looking at vLLM: signatures, sources and what our code imports of it.

Contract tests call vLLM rather than read it. A few claims are held against its text,
since no CPU can run them or since they say what *no* method does.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asl_vllm_testing.imports import MODULES

USERS = ("asl_vllm.engine", "asl_vllm.plugin", "asl_server")
"""What may import vLLM; tests/test_layers.py holds the others to it."""


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


def users_of_vllm() -> list[Path]:
    """The files that may import vLLM."""
    return [path for name, path in MODULES.items() if name.startswith(USERS)]


def vllm_symbols(path: Path) -> Iterator[str]:
    """Dotted names of vLLM that a file imports, anywhere, or names in a string."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Paths that vLLM resolves; prose has blanks, groups of plugins one dot.
            names = [node.value] if re.fullmatch(r"\w+(\.\w+){2,}", node.value) else []
        else:
            continue
        yield from (name for name in names if name.startswith("vllm."))
