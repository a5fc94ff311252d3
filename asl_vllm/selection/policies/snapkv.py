"""SnapKV: every layer keeps its own tokens and sends all of them deeper."""

from __future__ import annotations

from torch import Tensor

from asl_vllm.selection.policies.base import LayerDecision, Policy


class SnapKvPolicy(Policy):
    """Never selects: prunes the cache, saves no prefill (arXiv 2404.14469)."""

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """See `Policy.decide`."""
        return LayerDecision(self.best_per_head(head_scores))
