"""docs/vllm_touchpoints.md against the imports of the engine and these tests."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname

from asl_vllm_testing import ROOT
from tests.contract.looking import users_of_vllm, vllm_symbols

HERE = Path(__file__).parent
TABLE = ROOT / "docs" / "vllm_touchpoints.md"
HEADER = ["What for", "vLLM symbol", "How"]
SYMBOLS = sorted({name for path in users_of_vllm() for name in vllm_symbols(path)})


def sections() -> dict[str, list[list[str]]]:
    """Rows' cells (what for, symbol, how) by the test file of their section."""
    found: dict[str, list[list[str]]] = {}
    file = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        section = re.match(r"## .*\(`tests/contract/(test_\w+\.py)`\)$", line)
        if line.startswith("## "):
            file = section[1] if section else ""
        if not line.startswith("|") or set(line) <= set("|- "):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == HEADER[0]:
            assert cells == HEADER
        else:
            assert file, line
            found.setdefault(file, []).append(cells)
    return found


ROWS = [row for rows in sections().values() for row in rows]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_symbols_are_found() -> None:
    assert "vllm.engine.arg_utils.EngineArgs" in SYMBOLS
    assert "vllm.envs" in SYMBOLS
    assert "vllm.v1.worker.gpu_worker.Worker" in SYMBOLS, "names in strings"
    assert "vllm.forward_context.ForwardContext" in SYMBOLS, "imports for types"
    assert "vllm.entrypoints.cli.main.main" in SYMBOLS, "the server's too"


def resolve(name: str) -> object:
    """A module, or what a module has by that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return resolve_obj_by_qualname(name)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_exists(symbol: str) -> None:
    resolve(symbol)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_is_in_the_table(symbol: str) -> None:
    assert any(symbol in quoted(row[1]) for row in ROWS)


def test_the_tables_symbols_exist() -> None:
    for row in ROWS:
        for name in quoted(row[1]):
            owner, _, attribute = name.rpartition(".")
            try:
                resolve(name)
            except (ImportError, AttributeError):
                assert hasattr(resolve(owner), attribute), name


def test_the_tables_rows_are_complete() -> None:
    for row in ROWS:
        assert len(row) == len(HEADER), row
        assert all(row), row
        kind = row[2].split()[0].rstrip(",:;")
        assert kind in {"official", "subclass", "patch", "used"}, row


def test_every_file_of_contract_tests_has_a_section() -> None:
    files = {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert sections().keys() == files


def test_every_patch_of_the_code_is_a_patch_in_the_table() -> None:
    patched = set()
    for path in users_of_vllm():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                method = node.args[1] if len(node.args) > 1 else None
                if node.func.id == "wrap_method" and isinstance(method, ast.Constant):
                    patched.add(method.value)
    assert "create_engine_config" in patched
    listed = {
        name.rpartition(".")[2]
        for row in ROWS
        if row[2].startswith("patch")
        for name in quoted(row[1])
    }
    assert patched <= listed
