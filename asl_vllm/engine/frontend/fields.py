"""The request fields that are ours: what they mean, their schema, what they may be.

A field comes under its name: as a field of HTTP bodies, as a key of ``vllm_xargs``
and of ``SamplingParams.extra_args``. Null, or leaving it out, asks for nothing. What it
comes to leaves as a plan (`asl_vllm.engine.plan`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams

from asl_vllm.config import POLICY_NAMES, REUSE_MODES, SHALLOW_MODES
from asl_vllm.engine.settings import Settings
from asl_vllm.selection.budget import shown, validate_budget
from asl_vllm.selection.policies import policies_beside_windows

BUDGET_FIELD = "kv_budget"
POLICY_FIELD = "kv_policy"
SHALLOW_FIELD = "kv_shallow"
REUSE_FIELD = "kv_reuse"


@dataclass(frozen=True)
class RequestField:
    """A field of requests; ``schema`` and ``description`` are for OpenAPI."""

    name: str
    description: str
    schema: dict[str, Any]
    validate: Callable[[Any, Settings], object]
    """Given a value that is not None; raises a ValueError that says what, got,
    allowed."""


def _validate_budget(value: Any, settings: Settings) -> None:
    validate_budget(value, minimum=settings.minimum_budget)


def _check_name(field: str, value: Any, names: tuple[str, ...], null: str) -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f"{field}: got {shown(value)}; allowed: {', '.join(names)}, or null for "
            f"{null}."
        )


def _validate_policy(value: Any, settings: Settings) -> None:
    names = POLICY_NAMES
    if settings.has_windows:
        names = ("none", *policies_beside_windows())
    _check_name(POLICY_FIELD, value, names, "the server's policy")


def _validate_shallow(value: Any, settings: Settings) -> None:
    _check_name(SHALLOW_FIELD, value, SHALLOW_MODES, SHALLOW_MODES[0])
    if value == "full" and settings.config.bands == 1:
        raise ValueError(
            f"{SHALLOW_FIELD}: got 'full'; this server frees the same blocks for all "
            "layers. Leave it out, or ask for a server with --kv-bands above 1."
        )


def _validate_reuse(value: Any, settings: Settings) -> None:
    _check_name(REUSE_FIELD, value, REUSE_MODES, "the server's default")


FIELDS: tuple[RequestField, ...] = (
    RequestField(
        BUDGET_FIELD,
        "Tokens of the prompt whose KV cache is kept in each layer: an integer, or a "
        "share of the prompt in (0, 1]. null: the server's default. A budget of at "
        "least the prompt prunes nothing.",
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                {"type": "null"},
            ],
            "examples": [2048],
        },
        _validate_budget,
    ),
    RequestField(
        POLICY_FIELD,
        "How the tokens that a budget keeps are chosen; none prunes nothing, whatever "
        "the budget. null: the server's policy. Without a budget, the request's or "
        "the server's, it has no effect.",
        {
            "anyOf": [
                {"type": "string", "enum": list(POLICY_NAMES)},
                {"type": "null"},
            ],
            "examples": ["snapkv"],
        },
        _validate_policy,
    ),
    RequestField(
        SHALLOW_FIELD,
        "What the layers up to the selection layer keep: snapkv, the default, as many "
        "tokens as the others; full, all of them, which needs a server with "
        "--kv-bands and a policy that selects at one layer.",
        {
            "anyOf": [
                {"type": "string", "enum": list(SHALLOW_MODES)},
                {"type": "null"},
            ],
            "examples": ["full"],
        },
        _validate_shallow,
    ),
    RequestField(
        REUSE_FIELD,
        "What a pruned prompt takes from the server's prefix cache: read, the longest "
        "prefix that is there, which is not computed again; fill, the same, and what "
        "is not there is put there first, by an ordinary prefill; none, nothing. null: "
        "the server's default, which is read where prefix caching is on. Without a "
        "budget it has no effect.",
        {
            "anyOf": [
                {"type": "string", "enum": list(REUSE_MODES)},
                {"type": "null"},
            ],
            "examples": ["read"],
        },
        _validate_reuse,
    ),
)
"""In the order in which they are checked."""

NAMES = tuple(field.name for field in FIELDS)
VLLMS = ("kv_transfer_params", "kv_cache_report_mode")
"""Names of vLLM that begin like ours."""


def given_fields(params: SamplingParams) -> dict[str, Any]:
    """The fields that a request gives, by name, with their raw values."""
    extra_args = params.extra_args or {}
    values = {field.name: extra_args.get(field.name) for field in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def resembles(name: str) -> bool:
    """Whether a name that is not ours was meant so: ``kv_buget`` or ``kvBudget``."""
    if name in (*NAMES, *VLLMS):
        return False
    plain = name.lower().replace("-", "_")
    joined = {ours.replace("_", "") for ours in NAMES}
    return plain.startswith("kv_") or plain.replace("_", "") in joined
