"""The block managers of a model's bands, and which of them lack a prompt's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asl_vllm.engine.plan import PrunePlan
from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager
from asl_vllm.prefill import Bands, PrefillReport


class BandManagers:
    """vLLM's managers, one a band from layer 0 on."""

    def __init__(self, managers: Sequence[Any], bands: Bands) -> None:
        assert all(isinstance(manager, PrunedBlocksManager) for manager in managers)
        found = [manager.kv_cache_spec.band for manager in managers]
        assert found == list(range(bands.count)), found
        self._managers = managers

    def prune(
        self, request_id: str, plan: PrunePlan, report: PrefillReport | None = None
    ) -> None:
        """Has the deepest bands lack the pruned blocks: those that a prefill reported.

        Before there is a report all do, or none where layers may keep every token.
        """
        count = len(self._managers)
        if report is not None:
            deepest = report.pruned_bands
        else:
            deepest = 0 if plan.keep_shallow else count
        for band, manager in enumerate(self._managers):
            pruned = plan.pruned_blocks if band >= count - deepest else 0
            manager.set_pruned_blocks(request_id, pruned)
