"""The layers of the code: who may import whom, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from asl_vllm_testing import ROOT
from asl_vllm_testing.imports import FOLDERS, MODULES, imports_of

# Low to high; a package may import those before it, never those after it. The
# modules of asl_vllm itself (config, _version) lie below selection, for all to use.
LEVELS = (
    "asl_kernels",
    "asl_vllm",
    "asl_vllm.selection",
    "asl_vllm.prefill",
    "asl_vllm.engine",
    # What vLLM calls in every process.
    "asl_vllm.plugin",
    "asl_server",
)
ROOMS = ("frontend", "scheduler", "worker")
# Modules that join rooms, because vLLM makes the pair.
JOINTS = {
    "asl_vllm.engine.connector",
    "asl_vllm.engine.kv_spec",
    "asl_vllm.engine.multi_connector",
}
# Options, fields and plans of them; their block managers and specs; their seam in
# prefills, and the job and report that cross to it.
KNOW_BANDS = {
    "asl_vllm.config",
    "asl_vllm.engine.compat",
    "asl_vllm.engine.frontend.admission",
    "asl_vllm.engine.frontend.cli",
    "asl_vllm.engine.frontend.fields",
    "asl_vllm.engine.hashed",
    "asl_vllm.engine.kv_spec",
    "asl_vllm.engine.plan",
    "asl_vllm.engine.scheduler.bands",
    "asl_vllm.engine.scheduler.orders",
    "asl_vllm.engine.settings",
    "asl_vllm.engine.worker.warm_up",
    "asl_vllm.engine.worker.worker",
    "asl_vllm.prefill",
    "asl_vllm.prefill.bands",
    "asl_vllm.prefill.job",
    "asl_vllm.prefill.passes",
    "asl_vllm.prefill.tables",
}
VLLM_USERS = {"asl_vllm.engine", "asl_vllm.plugin", "asl_server"}


def imported(module: str) -> set[str]:
    path = MODULES[module]
    is_package = path.name == "__init__.py"
    return set(imports_of(path.read_text(encoding="utf-8"), module, is_package))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def level(module: str) -> int:
    return max(i for i, package in enumerate(LEVELS) if within(module, package))


def top_levels(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)}


def test_the_sources_are_found() -> None:
    assert {"asl_vllm.config", "asl_vllm.selection.budget"} <= MODULES.keys()
    assert "asl_kernels.window_scores" in MODULES


def test_imports_are_read() -> None:
    source = """
import a.b
from c import d
def function():
    from . import e
    from ..f import g
    from .. import h
"""
    assert set(imports_of(source, "p.q.r", is_package=False)) == {
        *("a.b", "c", "c.d", "p.q", "p.q.e", "p.f", "p.f.g", "p", "p.h")
    }
    assert "p.q.r.e" in set(imports_of(source, "p.q.r", is_package=True))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_from_above(module: str) -> None:
    for name in imported(module):
        if name.partition(".")[0] in FOLDERS:
            assert level(name) <= level(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_engine_and_the_server_know_vllm(module: str) -> None:
    if "vllm" in top_levels(module):
        assert any(within(module, package) for package in VLLM_USERS)


def room(module: str) -> str | None:
    """The room of the engine that a module is in; None: it is shared, or elsewhere."""
    for name in ROOMS:
        if within(module, f"asl_vllm.engine.{name}"):
            return name
    return None


@pytest.mark.parametrize(
    "module", [m for m in MODULES if within(m, "asl_vllm.engine") and m not in JOINTS]
)
def test_rooms_of_the_engine_meet_in_what_they_share_only(module: str) -> None:
    entered = {room(name) for name in imported(module)} - {None}
    assert entered <= {room(module)}, f"{module} imports {sorted(entered)}"


def test_the_models_depth_and_the_block_size_are_read_in_one_place() -> None:
    source = re.compile(r"cache_config\.block_size|\bget_num_layers\(")
    found = {name for name, path in MODULES.items() if source.search(path.read_text())}
    assert found == {"asl_vllm.engine.settings"}


def test_no_other_module_meets_bands() -> None:
    word = re.compile(r"(?i)(?<![a-z])bands?(?![a-z])|shallow")
    found = {name for name, path in MODULES.items() if word.search(path.read_text())}
    assert found == KNOW_BANDS


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_says_where_it_runs_and_what_it_owns(name: str) -> None:
    text = MODULES[f"asl_vllm.engine.{name}"].read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) or ""
    assert "process" in said
    assert "Owns " in said


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "asl_kernels")])
def test_kernels_import_torch_only(module: str) -> None:
    others = top_levels(module) - sys.stdlib_module_names - {"asl_kernels"}
    assert others <= {"torch", "triton"}


@pytest.mark.parametrize(
    "module", [m for m in MODULES if within(m, "asl_vllm.selection")]
)
def test_selection_imports_torch_and_kernels_only(module: str) -> None:
    others = top_levels(module) - sys.stdlib_module_names
    assert others <= {"torch", "asl_kernels", "asl_vllm"}


def test_config_imports_the_standard_library_only() -> None:
    assert top_levels("asl_vllm.config") <= sys.stdlib_module_names


def test_the_source_folders_are_no_packages() -> None:
    # A module named `kernels` would shadow a package that transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "server" / "__init__.py").exists()


def test_importing_does_not_load_vllm() -> None:
    code = (
        "import sys, asl_vllm; assert 'torch' not in sys.modules\n"
        "import asl_vllm.selection\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'vllm', 'transformers'}, loaded\n"
    )
    path = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "server"))]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], check=True
    )


USERS = ("benchmarks", "scripts", "testing", "tests", "training")


def files(*folders: str) -> Iterator[tuple[str, set[str]]]:
    """Each Python file below the folders, and all that it imports."""
    for path in (path for name in folders for path in (ROOT / name).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        text = path.read_text(encoding="utf-8")
        yield name, set(imports_of(text, name, is_package=path.name == "__init__.py"))


def test_only_tests_import_tests_and_no_test_module_is_imported() -> None:
    """What several need is in asl_vllm_testing, or in a module that is no test."""
    products = [(module, imported(module)) for module in MODULES]
    found = [
        (name, one)
        for name, imports in [*products, *files(*USERS)]
        for one in imports
        if within(one, "tests")
    ]
    assert ("tests.accuracy.test_digest", "tests.accuracy.records") in found
    assert [pair for pair in found if not within(pair[0], "tests")] == []
    test_module = re.compile(r"tests\.([a-z0-9_]+\.)*test_")
    assert [pair for pair in found if test_module.match(pair[1])] == []


def test_the_oracle_imports_nothing_of_what_it_checks() -> None:
    """So that a fault cannot hide in both sides of a comparison."""
    ours = {*FOLDERS, "vllm"}
    package = "testing.asl_vllm_testing"
    checked = dict(files("testing"))
    for name in (n for n in checked if within(n, f"{package}.oracle")):
        seen = {one.partition(".")[0] for one in checked[name]}
        assert not seen & ours, f"{name} imports {sorted(seen & ours)}"
