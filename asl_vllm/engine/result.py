"""What a reply says of one sequence's prompt, made in the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from asl_vllm.engine.plan import PrunePlan
from asl_vllm.prefill import PrefillReport


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """What came of a prompt with a plan: ``kv_transfer_params``, under these names.

    The policy, then counts, which are integers.
    """

    policy: str
    budget_tokens: int
    """What the budget came to."""
    selection_layer: int | None
    """None: none was selected, each layer chose its own or nothing was pruned."""
    kept_tokens: int
    pruned_tokens: int
    freed_blocks: int
    skipped_token_layers: int
    reused_tokens: int
    reused_token_layers: int
    rerun_token_layers: int
    filled_tokens: int
    """Of the reused ones, those that an ordinary prefill computed for it first."""
    shared_prefills: int
    """Sequences that took over another's prefill."""

    def numbers(self) -> dict[str, int]:
        """``usage.kv_cache``, which clients add up key by key: integers only.

        What has no number here is left out.
        """
        return {k: v for k, v in asdict(self).items() if isinstance(v, int)}


def prompt_result(plan: PrunePlan, report: PrefillReport | None) -> PromptResult:
    """Of one sequence; without a ``report`` its prompt was not pruned."""
    held = plan.in_force(report)
    return PromptResult(
        policy=plan.policy,
        budget_tokens=plan.budget_tokens,
        selection_layer=report.selection_layer if report else None,
        kept_tokens=held.kept_tokens,
        pruned_tokens=held.pruned_tokens,
        freed_blocks=plan.freed_blocks(report),
        skipped_token_layers=report.skipped_token_layers if report else 0,
        reused_tokens=report.reused_tokens if report else 0,
        reused_token_layers=report.reused_token_layers if report else 0,
        rerun_token_layers=report.rerun_token_layers if report else 0,
        filled_tokens=report.filled_tokens if report else 0,
        shared_prefills=int(report.shared) if report else 0,
    )


def sum_of(results: Sequence[PromptResult]) -> PromptResult:
    """The sequences of a request as one: counts add up, a common layer stays.

    They have the request's policy in common.
    """
    layers = {result.selection_layer for result in results}
    totals: dict[str, Any] = {
        field.name: sum(getattr(result, field.name) for result in results)
        for field in fields(PromptResult)
        if field.name not in ("policy", "selection_layer")
    }
    return PromptResult(
        policy=results[0].policy,
        selection_layer=layers.pop() if len(layers) == 1 else None,
        **totals,
    )
