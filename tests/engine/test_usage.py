"""``usage.kv_cache``: how the sequences of a request are put together."""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import fields
from typing import Any

import pytest
from vllm.entrypoints.openai.responses.protocol import ResponseUsage
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from asl_vllm.engine.frontend import usage
from asl_vllm.engine.frontend.usage import RequestUsage, collect
from asl_vllm.engine.result import PromptResult
from asl_vllm_testing import ROOT


@pytest.fixture(autouse=True)
def _installed() -> None:
    usage.install()


def told(layer: int | None = 3, kept: int = 100, pruned: int = 64) -> dict[str, Any]:
    """As the engine tells it, in ``kv_transfer_params``."""
    return {
        "policy": "asl",
        "budget_tokens": 128,
        "selection_layer": layer,
        "kept_tokens": kept,
        "pruned_tokens": pruned,
        "freed_blocks": pruned // 32,
        "skipped_token_layers": pruned * 2,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
        "filled_tokens": 0,
        "shared_prefills": 0,
    }


def added_up(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Sums of usage as clients make them for calls in a batch (langchain-openai)."""
    total = dict(total)
    for key, value in new.items():
        if isinstance(value, dict):
            total[key] = added_up(total.get(key, {}), value)
        elif type(value) is int:
            total[key] = total.get(key, 0) + value
        else:
            raise ValueError(f"{key}: {value!r} cannot be added up")
    return total


def test_one_sequence_is_reported_as_it_is() -> None:
    request = RequestUsage()
    assert request.result() is None
    sequence = request.sequence()
    assert request.result() is None
    sequence.end(told())
    assert request.result() == PromptResult(**told())


def test_without_a_plan_there_is_nothing_to_say() -> None:
    request = RequestUsage()
    request.sequence().end(None)
    assert request.result() is None


def test_several_are_summed_once_all_have_ended() -> None:
    request = RequestUsage()
    begun = [request.sequence() for _ in range(3)]
    for number, sequence in enumerate(begun, 1):
        assert request.result() is None
        sequence.end(told(kept=10 * number, pruned=32 * number))
    assert request.result() == PromptResult(
        **{**told(kept=60, pruned=192), "budget_tokens": 3 * 128}
    )


def test_a_layer_that_differs_is_left_out_and_one_without_a_plan_adds_nothing() -> None:
    request = RequestUsage()
    for part in (told(layer=3), told(layer=None), None):
        request.sequence().end(part)
    whole = request.result()
    assert whole is not None
    assert (whole.policy, whole.selection_layer) == ("asl", None)
    assert (whole.kept_tokens, whole.budget_tokens) == (200, 256)


def test_usage_can_be_added_up_key_by_key() -> None:
    """In any order, whether a layer was selected or a prompt was pruned at all."""
    parts = [
        PromptResult(**told(layer=layer, pruned=pruned)).numbers()
        for layer, pruned in ((3, 64), (None, 0), (0, 32))
    ]
    assert ["selection_layer" in part for part in parts] == [True, False, True]
    for order in itertools.permutations([{"kv_cache": part} for part in parts]):
        total: dict[str, Any] = {}
        for part in [*order, {"prompt_tokens": 3}]:
            total = added_up(total, part)
        assert total["kv_cache"]["pruned_tokens"] == 96
    with pytest.raises(ValueError, match="selection_layer"):
        added_up({}, told(layer=None) | {"policy": 0})


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
        sequence = request.sequence()
        assert model(**fields).model_dump_json() == stock
        sequence.end(told(layer=None))
        dumped = model(**fields).model_dump(exclude_unset=True, exclude_none=True)
        numbers = {k: v for k, v in told().items() if type(v) is int}
        del numbers["selection_layer"]
        assert dumped.pop("kv_cache") == numbers
    assert model(**fields).model_dump_json() == stock


def test_requests_side_by_side_do_not_mix() -> None:
    """Each HTTP request is a task, and its own tasks belong to it."""

    async def request(kept: int) -> Any:
        with collect() as mine:
            await asyncio.sleep(0)

            async def part() -> None:
                current = usage._current.get()
                assert current is mine
                current.sequence().end(told(kept=kept))

            await asyncio.create_task(part())
            await asyncio.sleep(0)
            return UsageInfo().model_dump()["kv_cache"]["kept_tokens"]

    async def both() -> list[Any]:
        return await asyncio.gather(request(5), request(7))

    assert asyncio.run(both()) == [5, 7]


def test_the_document_explains_every_number() -> None:
    document = (ROOT / "docs" / "api.md").read_text("utf-8")
    _, _, table = document.partition("| Key | Meaning |\n|---|---|\n")
    explained = re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.M)
    names = [field.name for field in fields(PromptResult)]
    assert explained == [name for name in names if name != "policy"]
