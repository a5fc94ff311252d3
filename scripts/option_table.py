#!/usr/bin/env python3
"""Writes the table of options in docs/configuration.md, from `AslConfig` itself.

    python scripts/option_table.py            # writes the document
    python scripts/option_table.py --check    # exit status 1 where it is not so

What an option means is the text below its field in asl_vllm/config.py; what is allowed
is what the message says that refuses another value.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys

from written_table import main

from asl_vllm.config import AslConfig, ConfigError

BEGIN = "<!-- options: written by scripts/option_table.py -->"
END = "<!-- end of options -->"
OWN_FLAGS = {"policy": "--kv-policy", "budget": "--kv-budget", "bands": "--kv-bands"}
"""Options that are flags of their own, not keys of ``--kv-policy-config``."""


def meanings() -> dict[str, str]:
    """Each field's text, in the order of the fields."""
    (tree,) = ast.parse(inspect.getsource(AslConfig)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr), f"{field.target.id} has no text"
            assert isinstance(text.value, ast.Constant)
            said = inspect.cleandoc(str(text.value.value))
            found[field.target.id] = " ".join(said.split())
    return found


def allowed(name: str) -> str:
    """Values of an option, from its refusal."""
    try:
        AslConfig.from_dict({name: -1})
    except ConfigError as error:
        found = re.search(r"allowed: (.+?)(?:, or null)?\.$", str(error))
        assert found, f"{name} is refused without what is allowed: {error}"
        return found[1]
    assert name == "budget", f"{name}: -1 is not refused"
    return "as `kv_budget`"  # by a rule that needs the block size


def table() -> str:
    """The table, a row a field."""
    texts = meanings()
    rows = ["| Option | Default | Allowed | Meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(AslConfig):
        name = OWN_FLAGS.get(field.name, f'"{field.name}"')
        default = json.dumps(field.default)
        meaning = re.sub(r"``(.+?)``", r"`\1`", texts[field.name]).replace("|", "\\|")
        meaning = re.sub(r",? one of `[A-Z_]+`", "", meaning).replace("None", "`null`")
        cells = (f"`{name}`", f"`{default}`", allowed(field.name), meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main("configuration.md", BEGIN, END, table()))
