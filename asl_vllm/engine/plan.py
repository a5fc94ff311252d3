"""What becomes of a request's prompt: made where it enters, read where it is scheduled.

A front end makes the plan once (`asl_vllm.engine.frontend.admission`) and puts it into
the request's ``extra_args``; the engine core takes it as it is. A request without one
is left alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams

from asl_vllm.prefill import PrefillReport
from asl_vllm.selection.budget import PrunedPrompt

PLAN_KEY = "asl_vllm_plan"
"""Key of ``extra_args`` under which a plan travels. Only front ends write it."""


@dataclass(frozen=True, kw_only=True)
class PrunePlan(PrunedPrompt):
    """A budget in force and what it means for its prompt; plain data."""

    policy: str
    budget: int | float
    """As it was given."""
    budget_tokens: int
    """What it came to for this prompt."""
    num_prompt_tokens: int
    pruned_blocks: int
    block_size: int
    keep_shallow: bool = False
    """Layers up to the selection layer keep every token."""
    reuse: str = "none"
    """What it takes from the prefix cache, one of `asl_vllm.config.REUSE_MODES`."""

    @property
    def absent_blocks(self) -> int:
        """Those of the pruned blocks that no layer holds from the first; none or all.

        None with full shallow layers: which layers are, the prefill finds out.
        """
        return 0 if self.keep_shallow else self.pruned_blocks

    def freed_blocks(self, report: PrefillReport | None) -> int:
        """Blocks that the prompt does not hold after this prefill; None: none was."""
        return self.pruned_blocks * report.pruned_bands if report else 0

    def in_force(self, report: PrefillReport | None) -> PrunePlan:
        """What it came to: nothing is pruned where no layers are."""
        if report and report.pruned_bands:
            return self
        return dataclasses.replace(self, pruned_blocks=0)

    def send_with(self, params: SamplingParams) -> None:
        """Has a request's parameters carry it to the engine core."""
        data = dataclasses.asdict(self)
        params.extra_args = {**(params.extra_args or {}), PLAN_KEY: data}


def plan_of(params: SamplingParams | None) -> PrunePlan | None:
    """The plan that a request carries; None: it is to be left alone."""
    extra_args = params.extra_args if params is not None else None
    data: dict[str, Any] | None = (extra_args or {}).get(PLAN_KEY)
    return None if data is None else PrunePlan(**data)
