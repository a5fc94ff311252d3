"""Options of vLLM that were looked at together with a policy, and the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import Field
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from asl_vllm.engine import lines
from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.frontend import options
from asl_vllm_testing.harness import TINY_MODEL

UNSEEN = {
    *("aux_output_config.enable_return_routed_experts", "diffusion_config"),
    *("ec_transfer_config", "enable_elastic_ep", "enable_fault_tolerance"),
    *("enable_hc_sp", "enable_nccl_comm_suspend", "enable_return_routed_experts"),
    *("enable_trace_replay", "engram_config", "kv_sharing_fast_prefill"),
    *("fault_tolerance_config.engine_recovery_timeout_sec",),
    *("prefill_schedule_interval", "prefix_match_unit", "scheduler_cls"),
    *("swa_bounded_replay",),
}
"""What vLLM 0.32 offers and nobody has looked at; refused with a policy on."""


def arguments(**given: Any) -> EngineArgs:
    return EngineArgs(model=str(TINY_MODEL), **given)


def offered() -> set[str]:
    found = set()
    args = arguments()
    for field in dataclasses.fields(AsyncEngineArgs):
        value = getattr(args, field.name, None)
        found.add(field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{f.name}" for f in dataclasses.fields(value)}
    return found


def test_every_option_of_vllm_was_looked_at_or_is_known_not_to_be() -> None:
    """A new one of another release: does it work with a policy? Then list it."""
    new = offered() - options.looked_at() - UNSEEN
    name, version = lines.installed() or ("", "")
    if lines.LINES[0].has(version):
        assert new == set(), f"new in {name} {version}"
        assert options.looked_at() <= offered(), "gone from vLLM"
        assert offered() >= UNSEEN


@pytest.mark.parametrize("line", lines.LINES, ids=lambda line: line.name)
def test_every_line_has_its_list(
    monkeypatch: pytest.MonkeyPatch, line: lines.Line
) -> None:
    monkeypatch.setattr(lines, "installed", lambda: ("vllm", line.release))
    options.looked_at.cache_clear()
    assert len(options.looked_at()) > 300
    assert not options.looked_at() & UNSEEN
    options.looked_at.cache_clear()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_model_len": 512, "enforce_eager": True},
        {"compilation_config": {"mode": 0}},
    ],
)
def test_what_was_looked_at_passes(given: dict[str, Any]) -> None:
    options.check(arguments(**given))


def test_another_is_refused_by_name_unless_at_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options.check(arguments(scheduler_cls=None))
    with pytest.raises(UnsupportedError, match=r"--scheduler-cls 'x\.Y', which"):
        options.check(arguments(scheduler_cls="x.Y"))
    known = options.looked_at() - {"compilation_config.mode"}
    monkeypatch.setattr(options, "looked_at", lambda: known)
    options.check(arguments())
    with pytest.raises(UnsupportedError, match=r"--compilation-config\.mode"):
        options.check(arguments(compilation_config={"mode": 0}))


def test_it_is_checked_where_a_policy_is_on() -> None:
    given: dict[str, Any] = {"enable_trace_replay": True}
    args = arguments(additional_config={"asl_vllm": {"policy": "asl"}}, **given)
    with pytest.raises(UnsupportedError, match="--enable-trace-replay True"):
        args.create_engine_config()


def test_a_default_in_pydantics_record_of_a_field_is_one() -> None:
    """Configurations of 0.33 have such; they are no option that was given."""

    @dataclasses.dataclass
    class Config:
        rows: int = Field(default=7, ge=1)

    assert list(options.given(Config(rows=7))) == []  # type: ignore[arg-type]
    changed = Config(rows=8)
    assert list(options.given(changed)) == [("rows", 8, 7)]  # type: ignore[arg-type]
