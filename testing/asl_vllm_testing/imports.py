"""What the modules of the project import, read from their sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from asl_vllm_testing import ROOT

FOLDERS = {
    "asl_vllm": ROOT,
    "asl_kernels": ROOT / "kernels",
    "asl_server": ROOT / "server",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


MODULES = modules()


def imports_of(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that the source imports anywhere, in functions too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # A name may be a module: `from asl_vllm import engine`.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
