"""What a reply says of one sequence's prompt, made in the scheduler."""

from __future__ import annotations

from typing import Any

from asl_vllm.prefill import PrefillReport


def sequence_usage(
    policy: str,
    budget: int | float | None,
    num_prompt_tokens: int,
    report: PrefillReport | None = None,
    freed_blocks: int = 0,
) -> dict[str, Any]:
    """What one sequence says; without a ``report`` its prompt was not pruned."""
    pruned_tokens = report.pruned_tokens if report else 0
    return {
        "policy": policy,
        "budget": budget,
        "selection_layer": report.selection_layer if report else None,
        "kept_tokens": num_prompt_tokens - pruned_tokens,
        "pruned_tokens": pruned_tokens,
        "freed_blocks": freed_blocks,
        "skipped_token_layers": report.skipped_token_layers if report else 0,
    }
