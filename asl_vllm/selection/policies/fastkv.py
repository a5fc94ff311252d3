"""FastKV: after one fixed layer, only a share of the prompt goes deeper."""

from __future__ import annotations

from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.selection.policies.base import Keep, LayerDecision, Policy

_REFERENCE_LAYER = 15
"""Of Llama 3.1 8B's 32 layers, as published."""


class FastKvPolicy(Policy):
    """Token-selective propagation (arXiv 2502.01068, the method's section).

    Every layer keeps what snapkv keeps. One layer, ``selection_layer`` or 15/32 of the
    depth, sends only the best ``propagated_share`` of the prompt deeper: the paper's
    TSP rate, apart from the budget. Where that is less than k tokens, k go deeper,
    since deeper layers must keep as many.
    """

    selects_once = True

    def __init__(self, config: AslConfig, *, num_layers: int, kept_tokens: int) -> None:
        """See `Policy`."""
        super().__init__(config, num_layers=num_layers, kept_tokens=kept_tokens)
        self._layer = config.resolved_selection_layer(num_layers, _REFERENCE_LAYER)

    @classmethod
    def most_deeper(cls, config: AslConfig, num_tokens: int, kept_tokens: int) -> int:
        """See `Policy.most_deeper`."""
        return max(kept_tokens, int(config.propagated_share * num_tokens))

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """See `Policy.decide`."""
        deeper: Tensor | Keep = Keep.ALL
        if layer == self._layer:
            tokens = len(layer_score) + self.tail
            count = self.most_deeper(self.config, tokens, self.kept_tokens)
            if count < tokens:
                deeper = self.tokens_deeper(layer_score, count)
        return LayerDecision(self.best_per_head(head_scores), deeper)
