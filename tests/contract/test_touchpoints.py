"""docs/vllm_touchpoints.md against the imports of the engine and these tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname

from tests.contract.looking import engine_modules, vllm_symbols

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "vllm_touchpoints.md"
HEADER = ["What", "vLLM symbol", "How", "Why", "Contract tests"]
SYMBOLS = sorted({name for path in engine_modules() for name in vllm_symbols(path)})


def rows_by_file() -> dict[str, list[list[str]]]:
    """Cells (what, symbol, how, why, contract tests) by the test file of a section."""
    found: dict[str, list[list[str]]] = {}
    file = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        section = re.match(r"## .*\(`tests/contract/(test_\w+\.py)`\)$", line)
        if line.startswith("## "):
            file = section[1] if section else ""
        if not line.startswith("|") or set(line) <= set("|- "):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "What":
            assert cells == HEADER
        else:
            assert file, line
            found.setdefault(file, []).append(cells)
    return found


def rows() -> list[list[str]]:
    return [row for section in rows_by_file().values() for row in section]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


FILES = sorted(path.name for path in HERE.glob("test_*.py") if path != Path(__file__))


def test_symbols_are_found() -> None:
    assert "vllm.engine.arg_utils.EngineArgs" in SYMBOLS
    assert "vllm.envs" in SYMBOLS
    assert "vllm.v1.worker.gpu_worker.Worker" in SYMBOLS, "names in strings"
    assert "vllm.forward_context.ForwardContext" in SYMBOLS, "imports for types"


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_exists(symbol: str) -> None:
    resolve_obj_by_qualname(symbol)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_is_in_the_table(symbol: str) -> None:
    assert any(symbol in quoted(row[1]) for row in rows())


def test_the_tables_symbols_exist() -> None:
    for row in rows():
        for name in quoted(row[1]):
            owner, _, attribute = name.rpartition(".")
            try:
                resolve_obj_by_qualname(name)
            except (ImportError, AttributeError):
                assert hasattr(resolve_obj_by_qualname(owner), attribute), name


def test_the_tables_rows_are_complete() -> None:
    for row in rows():
        assert len(row) == 5, row
        assert all(row), row
        kind = row[2].split()[0].rstrip(",:;")
        assert kind in {"official", "subclass", "patch", "used"}, row


def test_every_file_of_contract_tests_has_a_section() -> None:
    assert sorted(rows_by_file()) == FILES


@pytest.mark.parametrize("file", FILES)
def test_the_table_names_every_contract_test_and_no_other(file: str) -> None:
    named = {name for row in rows_by_file()[file] for name in quoted(row[4])}
    assert named == functions_of(HERE / file)


def test_every_patch_of_the_code_is_a_patch_in_the_table() -> None:
    patched = set()
    for path in engine_modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                method = node.args[1] if len(node.args) > 1 else None
                if node.func.id == "wrap_method" and isinstance(method, ast.Constant):
                    patched.add(method.value)
    assert "create_engine_config" in patched
    listed = {
        name.rpartition(".")[2]
        for row in rows()
        if row[2].startswith("patch")
        for name in quoted(row[1])
    }
    assert patched <= listed
