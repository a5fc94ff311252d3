"""What a reply says of one sequence's prompt, made in the scheduler."""

from __future__ import annotations

from typing import Any

from asl_vllm.engine.plan import PrunePlan
from asl_vllm.prefill import PrefillReport


def untouched_usage(num_prompt_tokens: int) -> dict[str, Any]:
    """What a sequence without a budget says."""
    return {
        "policy": "none",
        "budget": None,
        "selection_layer": None,
        "kept_tokens": num_prompt_tokens,
        "pruned_tokens": 0,
        "freed_blocks": 0,
        "skipped_token_layers": 0,
        "reused_tokens": 0,
        "reused_token_layers": 0,
        "rerun_token_layers": 0,
    }


def sequence_usage(plan: PrunePlan, report: PrefillReport | None) -> dict[str, Any]:
    """What one sequence says; without a ``report`` its prompt was not pruned."""
    pruned_bands = report.pruned_bands if report else 0
    held = plan.in_force(pruned_bands)
    return {
        "policy": plan.policy,
        "budget": plan.budget,
        "selection_layer": report.selection_layer if report else None,
        "kept_tokens": held.kept_tokens,
        "pruned_tokens": held.pruned_tokens,
        "freed_blocks": plan.freed_blocks(pruned_bands),
        "skipped_token_layers": report.skipped_token_layers if report else 0,
        "reused_tokens": report.reused_tokens if report else 0,
        "reused_token_layers": report.reused_token_layers if report else 0,
        "rerun_token_layers": report.rerun_token_layers if report else 0,
    }
