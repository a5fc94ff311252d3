"""The code of each symbol in docs/vllm_touchpoints.md, and fingerprints of it.

Read from files, without importing them, so that releases can be compared that are not
installed. What is compared is text without docstrings, comment lines and blank lines.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from asl_vllm_testing import ROOT

TABLE = ROOT / "docs" / "vllm_touchpoints.md"
STORED = Path(__file__).with_name("touch_points.txt")
UNKNOWN = "-"
"""In place of a fingerprint: the symbol is made when vLLM runs, or is not there."""


def symbols() -> list[str]:
    """The symbols of the table, sorted."""
    rows = [
        line.strip("|").split("|")
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return sorted(
        {name for row in rows for name in re.findall(r"`(vllm\.[\w.]+)`", row[1])}
    )


def fingerprints(files: Path) -> dict[str, str]:
    """Fingerprint of every symbol of the table in the vLLM that lies in ``files``."""
    return {symbol: _fingerprint(files, symbol) for symbol in symbols()}


def _fingerprint(files: Path, symbol: str) -> str:
    code = code_of(files, symbol)
    return hashlib.sha256(code.encode()).hexdigest()[:10] if code else UNKNOWN


def stored() -> dict[str, dict[str, str]]:
    """Fingerprints by release and symbol, as they were recorded."""
    head, *rows = [line.split() for line in STORED.read_text().splitlines()]
    return {
        release: {row[0]: row[column] for row in rows}
        for column, release in enumerate(head[1:], 1)
    }


def store(by_release: dict[str, dict[str, str]]) -> None:
    """Records fingerprints, a line for each symbol."""
    head = " ".join(["symbol", *by_release])
    rows = [
        " ".join([symbol, *(prints[symbol] for prints in by_release.values())])
        for symbol in symbols()
    ]
    STORED.write_text("\n".join([head, *rows, ""]))


# --- Finding code ---


def code_of(files: Path, symbol: str) -> str:
    """The code of a module, class, function or value; empty where none is found."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        module = _module(files, ".".join(parts[:length]))
        if module is not None:
            return "\n".join(_find(files, module, parts[length:]))
    return ""


class _Module:
    def __init__(self, path: Path, name: str) -> None:
        text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(text)
        self.lines = text.splitlines()
        self.name = name
        self.package = name if path.stem == "__init__" else name.rpartition(".")[0]

    def code(self, node: ast.AST) -> Iterator[str]:
        """The node's lines, decorators included, docstrings and comments not."""
        described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        skipped: set[int] = set()
        for inner in ast.walk(node):
            if isinstance(inner, described) and ast.get_docstring(inner) is not None:
                said = inner.body[0]
                assert said.end_lineno is not None
                skipped.update(range(said.lineno, said.end_lineno + 1))
        first, last = 1, len(self.lines)
        if not isinstance(node, ast.Module):
            decorators = getattr(node, "decorator_list", [])
            first = min(n.lineno for n in [node, *decorators])  # type: ignore[attr-defined]
            last = node.end_lineno  # type: ignore[attr-defined]
        for number in range(first, last + 1):
            line = self.lines[number - 1].rstrip()
            if line and number not in skipped and not line.lstrip().startswith("#"):
                yield line


@cache
def _module(files: Path, name: str) -> _Module | None:
    place = files.joinpath(*name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return _Module(path, name)
    return None


def _find(files: Path, module: _Module, parts: list[str]) -> list[str]:
    if not parts:
        return list(module.code(module.tree))
    name, *rest = parts
    found: list[str] = []
    for node in _statements(module.tree.body):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) in (name, "*"):
                    own = name if alias.name == "*" else alias.name
                    if followed := _follow(files, module, node, [own, *rest]):
                        return followed
        elif name in _names(node):
            if not rest:
                found += module.code(node)
            elif isinstance(node, ast.ClassDef):
                found += _member(files, module, node, rest[0])
    return found


def _follow(
    files: Path, module: _Module, node: ast.ImportFrom, parts: list[str]
) -> list[str]:
    """The code of an imported name, in the module that it is imported from."""
    base = node.module or ""
    if node.level:
        above = module.package.split(".")
        base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
    return code_of(files, ".".join([base, *parts])).splitlines()


def _member(files: Path, module: _Module, owner: ast.ClassDef, name: str) -> list[str]:
    """A member's code, in the class or in the first base that has it."""
    found = [
        line
        for node in owner.body
        if name in _names(node)
        for line in module.code(node)
    ]
    if found:
        return found
    for base in owner.bases:
        if isinstance(base, ast.Name) and base.id != owner.name:
            found = _find(files, module, [base.id, name])
            if found:
                return found
    return []


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, also those in conditions."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}
