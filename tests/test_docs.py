"""The documents against the code."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest

from asl_vllm.config import BUILT_IN_POLICIES
from asl_vllm_testing import warm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STRUCTURES = DOCS / "structures.md"
FOLDERS = ("asl_vllm", "kernels", "server")
# Folders of operations, and what lies below a package that has a row, need none.
PACKAGES = sorted(
    {
        path.parent.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
        if path.parent.parent.name != "asl_kernels" and path.parent.name != "triton"
    }
)
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
LINKING = [
    *DOCUMENTS,
    *("README.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("deploy/README.md", "examples/README.md", "training/MODEL_CARD.md"),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_row(package: str) -> None:
    text = STRUCTURES.read_text(encoding="utf-8")
    assert re.search(rf"^\| `{package}/` \|", text, re.M)


@pytest.mark.parametrize("name", BUILT_IN_POLICIES)
def test_every_policy_has_a_row(name: str) -> None:
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{name}` \|", text, re.M)
    assert f"\n- `{name}`: " in text


TABLES = ["option_table.py", "endpoint_table.py", "gpu_table.py", "model_table.py"]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_a_document_is_the_codes(name: str) -> None:
    script = ROOT / "scripts" / name
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    ran = warm.run(
        [sys.executable, "-c", code, "--check"], PYTHONPATH=str(script.parent)
    )
    assert ran.returncode == 0, f"run {script.relative_to(ROOT)}: {ran.stderr[-4000:]}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str) -> None:
    """Names in backticks that look like files of this repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|md|toml|json))`", text))
    places = (ROOT, ROOT / "asl_vllm", DOCS)
    for name in names:
        assert any((place / name).exists() for place in places), name


def headings(document: Path) -> set[str]:
    """What links may name of a document, as GitHub spells its headings."""
    found = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("document", LINKING)
def test_links_lead_to_files_and_headings(document: str) -> None:
    path = ROOT / document
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), link
        assert not anchor or anchor in headings(linked), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_have_rows_of_one_length(document: str) -> None:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|"), below
