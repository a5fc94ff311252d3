"""Which tokens of a prompt stay in the KV cache: the rule, without an engine.

Scores come from `asl_kernels`; here they become ranks, a variance, and the kept
tokens. Depends on torch only; `replay` runs the whole rule on recorded tensors.
"""

from asl_vllm.selection.budget import (
    BudgetError,
    minimum_budget,
    resolve_kept,
    validate_budget,
)
from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.kept import kept_per_head, propagated_tokens, top_tokens
from asl_vllm.selection.policies import POLICIES, LayerDecision, Policy, make_policy
from asl_vllm.selection.replay import ReplayResult, replay

__all__ = [
    "POLICIES",
    "BudgetError",
    "LayerDecision",
    "Policy",
    "ReplayResult",
    "SelectionError",
    "kept_per_head",
    "make_policy",
    "minimum_budget",
    "propagated_tokens",
    "replay",
    "resolve_kept",
    "top_tokens",
    "validate_budget",
]
