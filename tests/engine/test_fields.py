"""The fields of requests that are ours: what they may be, wherever they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from asl_vllm.config import POLICY_NAMES, REUSE_MODES, SHALLOW_MODES, AslConfig
from asl_vllm.engine.frontend import served
from asl_vllm.engine.frontend.admission import read
from asl_vllm.engine.frontend.fields import FIELDS, given_fields
from asl_vllm.engine.settings import Settings
from asl_vllm_testing.vllm_configs import COHERE2, engine_config, model_dir

OFF = AslConfig()
ON = AslConfig(policy="asl", bands=2)
GOOD: dict[str, list[Any]] = {
    "kv_budget": [48, 0.5, 1.0],
    "kv_policy": list(POLICY_NAMES),
    "kv_shallow": list(SHALLOW_MODES),
    "kv_reuse": list(REUSE_MODES),
}
BAD: dict[str, list[Any]] = {
    "kv_budget": [0, 47, -1, 1.5, True, "64", [64], {}, float("nan")],
    "kv_policy": ["", "h2o", "ASL", " asl", "base", 0, 1, True, 0.5, ["asl"], {}],
    "kv_shallow": ["", "FULL", "asl", 0, 1, True, ["full"], {}],
    "kv_reuse": ["", "READ", "write", 0, 1, True, ["read"], {}],
}
ASKED = [(name, value) for name, values in BAD.items() for value in values]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(extra_args={"other": 1, **fields})


def settings(config: AslConfig) -> Settings:
    return Settings(config, engine_config(block_size=16))


def refusal(config: AslConfig, **fields: Any) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refused:
        read(settings(config), params(**fields))
    return refused.value


def test_every_field_is_tried_here() -> None:
    assert [field.name for field in FIELDS] == list(GOOD) == list(BAD)


@pytest.mark.parametrize("name", GOOD)
def test_good_values(name: str) -> None:
    for value in [None, *GOOD[name]]:
        given = {} if value is None else {name: value}
        assert read(settings(ON), params(**{name: value})) == given


@pytest.mark.parametrize(("name", "value"), ASKED, ids=str)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    error = refusal(ON, **{name: value})
    assert error.parameter == name
    assert f"{name}: got {value!r}; allowed: " in str(error)
    if name == "kv_policy":
        assert f"allowed: {', '.join(POLICY_NAMES)}, or null" in str(error)


def test_beside_windows_no_policy_starts_over(tmp_path: Path) -> None:
    model = model_dir(tmp_path / "model", **COHERE2)
    windowed = Settings(ON, engine_config(model=model))
    assert windowed.has_windows
    assert (windowed.reads_prefixes, windowed.reuse) == (False, "none")
    assert read(windowed, params(kv_policy="snapkv"))
    with pytest.raises(VLLMValidationError) as refused:
        read(windowed, params(kv_policy="gemfilter"))
    assert "got 'gemfilter'; allowed: none, asl, fastkv, pyr" in str(refused.value)
    assert refused.value.parameter == "kv_policy"


def test_long_values_are_cut_short() -> None:
    message = str(refusal(ON, kv_policy="x" * 10_000))
    assert len(message) < 600


@pytest.mark.parametrize("name", GOOD)
def test_a_server_without_a_policy_refuses_all(name: str) -> None:
    for value in [*GOOD[name], *BAD[name]]:
        error = refusal(OFF, **{name: value})
        assert error.parameter == name
        assert f"{name} was given" in str(error)
        assert "started without --kv-policy" in str(error)
    assert read(settings(OFF), params(**{name: None})) == {}
    assert read(settings(OFF), SamplingParams()) == {}


def test_one_bad_field_beside_a_good_one_is_refused() -> None:
    assert refusal(ON, kv_budget=64, kv_policy="h2o").parameter == "kv_policy"
    assert refusal(ON, kv_budget=3, kv_policy="none").parameter == "kv_budget"


def test_what_a_request_gives() -> None:
    assert given_fields(params(kv_policy="asl", kv_budget=None)) == {"kv_policy": "asl"}
    assert given_fields(params()) == {}
    assert given_fields(SamplingParams()) == {}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_the_schema_says_what_is_allowed(field: Any) -> None:
    types = [kind["type"] for kind in field.schema["anyOf"]]
    assert types[-1] == "null"
    for example in field.schema["examples"]:
        field.validate(example, settings(ON))
    if field.name == "kv_policy":
        assert field.schema["anyOf"][0]["enum"] == list(POLICY_NAMES)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("where", ["body", "vllm_xargs"])
def test_without_a_policy_fields_are_refused_before_a_reply_begins(
    where: str, name: str
) -> None:
    served.serve(engine_config())
    fields = {name: GOOD[name][0]}
    body = fields if where == "body" else {"vllm_xargs": fields}
    asked = CompletionRequest(prompt="x", **body)
    with pytest.raises(VLLMValidationError, match=f"{name} was given, but this server"):
        asked.to_sampling_params(16, {})


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("where", ["body", "vllm_xargs"])
@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        (CompletionRequest, {"prompt": "x"}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    ],
    ids=["completions", "chat"],
)
def test_beam_search_is_refused(
    model: type, prompt: dict[str, Any], where: str, name: str
) -> None:
    fields = {name: GOOD[name][0]}
    body = fields if where == "body" else {"vllm_xargs": fields}
    with pytest.raises(VLLMValidationError, match="combined with beam search") as error:
        model(**prompt, **body).to_beam_search_params(16, {})
    assert error.value.parameter == name
    model(**prompt).to_beam_search_params(16, {})
