"""The short form of `make soak`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from asl_vllm_testing.harness import Engine, engine
from tests.soak.items import Item, catalogue
from tests.soak.load import ENGINE, FAULTS, Soak
from tests.soak.report import Report

SECONDS = 15


@pytest.fixture(scope="module")
def items(random_model: Path) -> list[Item]:
    return catalogue(random_model, items=12, longest=700)


@pytest.fixture(scope="module")
def host(random_model: Path) -> Iterator[Engine]:
    with engine(random_model, **ENGINE) as started:
        yield started


def test_mixed_load_and_faults(host: Engine, items: list[Item]) -> None:
    report = Soak(host, items, seed=1).run(SECONDS)
    assert report.ok, str(report)
    assert report.ended["right"] >= 5, str(report)
    assert report.faults.total() > 0
    assert set(report.faults) <= set(FAULTS)
    text = str(report)
    assert "wrong   0" in text
    assert "leaked  0" in text


def test_a_wrong_answer_and_a_lost_block_are_reported(
    host: Engine, items: list[Item]
) -> None:
    other = [replace(item, answer=[*item.answer[1:], 0]) for item in items]
    report = Soak(host, other, seed=2).run(3)
    assert not report.ok
    assert "expected" in str(report)
    (lost,) = host.pool.get_new_blocks(1)
    try:
        report = Report(leaked=host.start_free - host.free_blocks)
        report.ended["right"] = 1
        assert not report.ok
        assert "leaked  1" in str(report)
    finally:
        host.pool.free_blocks([lost])
