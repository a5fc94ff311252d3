"""The block managers of a model's bands, and which of them lack a prompt's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from asl_vllm.engine.plan import PrunePlan
from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager
from asl_vllm.prefill import Bands, PrefillReport


class BandManagers:
    """vLLM's managers of blocks that can be pruned, one a band from layer 0 on.

    Beside layers with a sliding window there are no bands, but there may be several
    managers of the other layers.
    """

    def __init__(self, managers: Sequence[PrunedBlocksManager], bands: Bands) -> None:
        found = [manager.kv_cache_spec.band for manager in managers]
        assert found in (list(range(bands.count)), [0] * len(managers)), found
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
