"""From a request's budget and policy to what will be kept of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams

from asl_vllm.config import AslConfig
from asl_vllm.selection.budget import resolve_kept

BUDGET_FIELD = "kv_budget"
"""Name of the request field, of the ``extra_args`` and of the ``vllm_xargs`` key."""

POLICY_FIELD = "kv_policy"
"""Likewise."""

SHALLOW_FIELD = "kv_shallow"
"""Likewise."""


@dataclass(frozen=True)
class PrunePlan:
    """What a request asked for and what that means for its prompt."""

    policy: str
    budget: int | float
    num_prompt_tokens: int
    kept_tokens: int
    keep_shallow: bool = False
    """Layers up to the selection layer keep every token."""

    @property
    def pruned_tokens(self) -> int:
        """Tokens a layer drops; a multiple of the block size, 0 = stock vLLM."""
        return self.num_prompt_tokens - self.kept_tokens


def asked_budget(params: SamplingParams | None) -> Any:
    """The raw ``kv_budget`` of a request's ``extra_args``; None where absent."""
    return _asked(params, BUDGET_FIELD)


def asked_policy(params: SamplingParams | None) -> Any:
    """The raw ``kv_policy`` of a request's ``extra_args``; None where absent."""
    return _asked(params, POLICY_FIELD)


def asked_shallow(params: SamplingParams | None) -> Any:
    """The raw ``kv_shallow`` of a request's ``extra_args``; None where absent."""
    return _asked(params, SHALLOW_FIELD)


def _asked(params: SamplingParams | None, name: str) -> Any:
    extra_args = getattr(params, "extra_args", None) or {}
    return extra_args.get(name)


def plan_request(
    config: AslConfig,
    asked: Any,
    num_prompt_tokens: int,
    block_size: int,
    *,
    policy: str | None = None,
    shallow: str | None = None,
) -> PrunePlan | None:
    """The plan of a request; None when it is to be left alone.

    That is when neither it nor the server names a budget, and when the policy that
    goes, its own or else the server's, is ``none``. What it asks for, its budget
    ``asked``, ``policy`` and ``shallow``, must be valid
    (`asl_vllm.engine.frontend.admission.check_fields`).
    """
    budget = config.budget if asked is None else asked
    policy = policy or config.policy
    if not config.enabled or policy == "none" or budget is None:
        return None
    kept = resolve_kept(
        budget,
        num_prompt_tokens=num_prompt_tokens,
        block_size=block_size,
        window=config.window,
    )
    return PrunePlan(policy, budget, num_prompt_tokens, kept, shallow == "full")


def plan_for(
    config: AslConfig, params: SamplingParams, num_prompt_tokens: int, block_size: int
) -> PrunePlan | None:
    """`plan_request` of what a request's parameters ask for."""
    return plan_request(
        config,
        asked_budget(params),
        num_prompt_tokens,
        block_size,
        policy=asked_policy(params),
        shallow=asked_shallow(params),
    )
