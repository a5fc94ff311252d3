"""A package of another's adds a policy, as docs/policies.md says; bad ones are refused.

tests/e2e/test_wheel.py serves the same package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from asl_vllm.config import POLICY_GROUP, ConfigError
from asl_vllm.selection import Policy
from asl_vllm.selection.policies import installed
from asl_vllm_testing import policy_package, warm

TRIAL = """
from asl_vllm.config import POLICY_NAMES, AslConfig
assert POLICY_NAMES[:2] == ("none", "asl")
assert POLICY_NAMES[-1] == "newest", POLICY_NAMES

import torch
from asl_vllm.selection import installed_policies, replay
assert installed_policies()["newest"].__module__ == "newest_policy"
config = AslConfig(policy="newest", window=4)
q, k = torch.randn(3, 2, 4, 16), torch.randn(3, 1, 50, 16)
result = replay(q, k, config, budget=10)
assert result.selection_layer == 1, result.selection_layer
assert [kept.tolist() for kept in result.kept] == [[list(range(40, 50))]] * 2
assert result.deeper.tolist() == list(range(40, 50))

from asl_vllm.prefill import PrefillFactory
from asl_vllm_testing.toy import ToyDecoder, buffers, job
model = ToyDecoder()
prefill = PrefillFactory(model, buffers(), config, 16)(job(policy="newest"))
prefill.advance(10**9)
assert prefill.report().selection_layer == 1
assert prefill.report().computed_token_layers == 2 * 44 + 3 * 20

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from asl_vllm.engine.frontend.cli import install
from asl_vllm.engine.frontend.fields import FIELDS
install()
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
assert parser.parse_args(["--kv-policy", "newest"]).kv_policy == "newest"
(field,) = [field for field in FIELDS if field.name == "kv_policy"]
assert "newest" in field.schema["anyOf"][0]["enum"]
"""


def run(program: str, package: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), *filter(None, sys.path)])
    return warm.run([sys.executable, "-c", program], PYTHONPATH=path)


def test_a_package_adds_a_policy(tmp_path: Path) -> None:
    """In a process of its own, since names are read when asl_vllm is imported."""
    package = policy_package.install(tmp_path)
    done = run(TRIAL, package)
    assert done.returncode == 0, done.stderr


def found(folder: Path, *points: str) -> dict[str, type[Policy]]:
    """What is made of a package ``others`` with these entry points."""
    info = folder / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{POLICY_GROUP}]", *points]))
    (folder / "others.py").write_text(
        "from asl_vllm.selection import Policy\n"
        "class Abstract(Policy): pass\n"
        "class Whole(Policy):\n    def decide(self, *_): raise AssertionError\n"
    )
    (folder / "broken.py").write_text("import tortch\n")
    points_of = Distribution.at(info).entry_points
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(installed, "entry_points", lambda group: points_of)
        patched.syspath_prepend(folder)
        patched.delitem(sys.modules, "others", raising=False)
        return installed.policies_of_packages.__wrapped__()


def test_a_package_may_have_several(tmp_path: Path) -> None:
    points = ("whole = others:Whole", "whole-2_b = others:Whole")
    assert list(found(tmp_path, *points)) == ["whole", "whole-2_b"]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            ["asl = others:Whole"],
            "entry point 'asl' of group asl_vllm.policies in package others: got "
            "'others:Whole', a name that asl_vllm has; allowed: a name of its own. "
            "Remedy: uninstall others or rename the policy there.",
        ),
        (["none = others:Whole"], "'others:Whole', a name that asl_vllm has; "),
        (
            ["one = others:Whole", "two = others:Whole", "one = others:Abstract"],
            "'others:Abstract', a name that others has; ",
        ),
        (
            ["My Policy = others:Whole"],
            "allowed: lower-case letters, digits, _ and -, a letter first. Remedy: re",
        ),
        (
            ["new = broken:Policy"],
            "'broken:Policy', which cannot be imported (ModuleNotFoundError: No module "
            "named 'tortch'); allowed: MODULE:CLASS, a subclass of asl_vllm.selection."
            "Policy with a decide(). Remedy: repair or uninstall others.",
        ),
        (["new = others:Missing"], "which cannot be imported (AttributeError: "),
        (["new = others"], "'others', which is no such class; allowed: MODULE:CLASS, "),
        (["new = math:inf"], "'math:inf', which is no such class; "),
        (["new = builtins:int"], "'builtins:int', which is no such class; "),
        (["new = others:Abstract"], "'others:Abstract', which is no such class; "),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_a_bad_entry_point_is_refused(
    points: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        found(tmp_path, *points)
