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
from asl_vllm.selection.deciding import decide
from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.kept import best_and_tail, top_tokens
from asl_vllm.selection.policies import (
    POLICIES,
    Keep,
    LayerDecision,
    Policy,
    installed_policies,
    make_policy,
)
from asl_vllm.selection.replay import ReplayResult, replay

__all__ = [
    "POLICIES",
    "BudgetError",
    "Keep",
    "LayerDecision",
    "Policy",
    "ReplayResult",
    "SelectionError",
    "best_and_tail",
    "decide",
    "installed_policies",
    "make_policy",
    "minimum_budget",
    "replay",
    "resolve_kept",
    "top_tokens",
    "validate_budget",
]
