"""The alert rules: what they ask for, and their own unit tests."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from asl_vllm_testing import scripts
from tests.deploy.metrics import LABELS, series
from tests.deploy.promql import asked

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
(GROUP,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
RULES = {rule["alert"]: rule for rule in GROUP["rules"]}
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
DURATION = re.compile(r"\d+[smhd]")


@pytest.mark.parametrize("name", RULES)
def test_rules_ask_for_metrics_and_labels_that_exist(name) -> None:
    wanted = asked(RULES[name]["expr"])
    assert wanted.metrics
    assert wanted.metrics <= series()
    assert wanted.labels <= LABELS


def test_a_wrong_metric_or_grammar_would_be_found() -> None:
    assert not asked("vllm:asl_freed_blocks > 0").metrics <= series()
    with pytest.raises(ValueError, match="invalid promql"):
        asked("sum by (rate(up[5m]))")


@pytest.mark.parametrize("name", RULES)
def test_rules_are_complete(name) -> None:
    rule = RULES[name]
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert DURATION.fullmatch(rule.get("for", "0s"))
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("name", RULES)
def test_texts_use_labels_that_the_expression_keeps(name) -> None:
    rule = RULES[name]
    used = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
    kept = re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"])
    for label in used:
        for labels in kept:
            assert label in re.split(r",\s*", labels)


@pytest.mark.parametrize("name", RULES)
def test_the_runbook_says_what_to_do(name) -> None:
    assert re.search(rf"^### {name}$", RUNBOOK, re.M)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_has_a_unit_test_in_which_it_fires(name) -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert any(c["alertname"] == name and c.get("exp_alerts") for c in cases)


@pytest.fixture(scope="module")
def promtool():
    finder = scripts.load("prometheus")
    try:
        return str(finder.find_or_fetch("promtool"))
    except finder.NoPrometheusError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_accepts(promtool, arguments) -> None:
    ran = subprocess.run(
        [promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
