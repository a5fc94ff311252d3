"""``usage.kv_cache``: how the sequences of a request are put together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.entrypoints.openai.responses.protocol import ResponseUsage
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from asl_vllm.engine.frontend import usage
from asl_vllm.engine.frontend.usage import RequestUsage, collect


@pytest.fixture(autouse=True)
def _installed() -> None:
    usage.install()


def result(layer: int | None = 3, kept: int = 100, pruned: int = 64) -> dict[str, Any]:
    return {
        "policy": "asl",
        "budget": 128,
        "selection_layer": layer,
        "kept_tokens": kept,
        "pruned_tokens": pruned,
        "freed_blocks": pruned // 32,
        "skipped_token_layers": pruned * 2,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
    }


def test_one_sequence_is_reported_as_it_is() -> None:
    request = RequestUsage()
    assert request.report() is None
    sequence = request.sequence("a", 0, 164)
    assert request.report() is None
    sequence.end(result())
    assert request.report() == result()


def test_without_a_budget_the_whole_prompt_is_kept() -> None:
    request = RequestUsage()
    request.sequence("a", 0, 164).end(None)
    assert request.report() == {
        "policy": "none",
        "budget": None,
        "selection_layer": None,
        "kept_tokens": 164,
        "pruned_tokens": 0,
        "freed_blocks": 0,
        "skipped_token_layers": 0,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
    }


def test_several_are_summed_and_listed_in_the_order_of_choices() -> None:
    """Prompts in the order they were sent, whichever begins or ends first."""
    request = RequestUsage()
    assert [request.prompt(name) for name in ("first", "second")] == [0, 1]
    begun = {
        (name, index): request.sequence(name, index, 164)
        for name in ("second", "first")
        for index in (1, 0)
    }
    parts = {key: result(kept=10 * i, pruned=32 * i) for i, key in enumerate(begun, 1)}
    for key, sequence in begun.items():
        assert request.report() is None
        sequence.end(parts[key])
    report = request.report()
    assert report is not None
    order = [("first", 0), ("first", 1), ("second", 0), ("second", 1)]
    assert report.pop("sequences") == [parts[key] for key in order]
    assert report == {
        "policy": "asl",
        "budget": 128,
        "selection_layer": 3,
        "kept_tokens": 100,
        "pruned_tokens": 320,
        "freed_blocks": 10,
        "skipped_token_layers": 640,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
    }


def test_what_differs_is_null_in_the_whole() -> None:
    request = RequestUsage()
    request.sequence("a", 0, 164).end(result(layer=3))
    request.sequence("b", 0, 50).end({**result(layer=None), "policy": "none"})
    report = request.report()
    assert report is not None
    assert (report["policy"], report["selection_layer"]) == (None, None)
    assert report["budget"] == 128
    assert [s["selection_layer"] for s in report["sequences"]] == [3, None]


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (UsageInfo, {"prompt_tokens": 3}),
        (
            ResponseUsage,
            {
                **{"input_tokens": 3, "output_tokens": 1, "total_tokens": 4},
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        ),
    ],
)
def test_usage_models_carry_it_once_all_have_ended(model: Any, fields: Any) -> None:
    stock = model(**fields).model_dump_json()
    assert "kv_cache" not in stock
    with collect() as request:
        assert model(**fields).model_dump_json() == stock
        sequence = request.sequence("a", 0, 164)
        assert model(**fields).model_dump_json() == stock
        sequence.end(result())
        dumped = model(**fields).model_dump(exclude_unset=True, exclude_none=True)
        assert dumped.pop("kv_cache") == {
            key: value for key, value in result().items() if value is not None
        }
    assert model(**fields).model_dump_json() == stock


def test_requests_side_by_side_do_not_mix() -> None:
    """Each HTTP request is a task, and its own tasks belong to it."""

    async def request(name: str, kept: int) -> Any:
        with collect() as mine:
            await asyncio.sleep(0)

            async def part() -> None:
                current = usage._current.get()
                assert current is mine
                current.sequence(name, 0, kept).end(None)

            await asyncio.create_task(part())
            await asyncio.sleep(0)
            return UsageInfo().model_dump()["kv_cache"]["kept_tokens"]

    async def both() -> list[Any]:
        return await asyncio.gather(request("a", 5), request("b", 7))

    assert asyncio.run(both()) == [5, 7]
