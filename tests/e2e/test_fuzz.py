"""The short form of ``make fuzz``: hostile requests, no 500, no hang, nothing leaks."""

from __future__ import annotations

from typing import Any

import pytest

from asl_vllm_testing.server import Server
from tests.fuzzing.bodies import mutated, placed, raw
from tests.fuzzing.runner import IDLE, generated, run, state
from tests.fuzzing.stock import is_stock

SEED = 1


@pytest.fixture(scope="module")
def openapi(pruning: Server) -> dict[str, Any]:
    document: dict[str, Any] = pruning.http.get("/openapi.json").json()
    return document


@pytest.mark.parametrize("kind", ["raw", "placed", "mutated", "generated"])
def test_hostile_requests(pruning: Server, openapi: dict[str, Any], kind: str) -> None:
    cases = {
        "raw": lambda: raw(megabytes=1),
        "placed": placed,
        "mutated": lambda: mutated(openapi, SEED, 600),
        "generated": lambda: generated(openapi, SEED, 24),
    }[kind]()
    verdict = run(pruning.url, cases)
    ours = [failure for failure in verdict.failures if not is_stock(*failure)]
    assert not ours, "\n".join(f"{case.shown()} -> {why}" for case, why in ours[:5])
    assert verdict.answers["200"] + verdict.answers["405"] > 0
    assert verdict.answers["400"] > 0
    assert state(pruning.http) == IDLE
