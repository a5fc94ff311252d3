"""SnapKV: every layer keeps its own tokens and sends all of them deeper."""

from __future__ import annotations

from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.selection.policies.base import LayerDecision, Policy


class SnapKvPolicy(Policy):
    """Never selects: prunes the cache, saves no prefill (arXiv 2404.14469)."""

    @classmethod
    def most_deeper(cls, config: AslConfig, num_tokens: int, kept_tokens: int) -> int:
        """See `Policy.most_deeper`: none are dropped."""
        return 0

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """See `Policy.decide`."""
        return LayerDecision(self.best_per_head(head_scores))
