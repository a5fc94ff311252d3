"""PyramidInfer: fewer tokens go deeper at each layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asl_vllm.selection.policies.base import LayerDecision, Policy

_SINKS = 4
"""First tokens that stay before any other, as in the published configurations."""
_LAST_ROW_WEIGHT = 1.2
"""Weight of the window's last row against its first's, likewise."""


class PyramidInferPolicy(Policy):
    """Pivotal context that shrinks with the depth (arXiv 2405.12532, prefill phase).

    A layer's tokens are ranked by the attention of the window's rows, later rows
    weighing more, averaged over all heads. The best share of those before the window
    goes deeper; the share falls from 1 at the first layer to ``decay_ratio`` by half a
    cosine. The paper's layers then hold all tokens that entered them; here each keeps
    the k best of them by the same ranking, and no fewer than k go deeper.
    """

    def score(
        self, layer: int, window_queries: Tensor, keys: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of the window, later rows weighing more; not pooled."""
        rows = len(window_queries)
        # Up to 1, since only the ranks matter.
        weights = torch.linspace(
            1 / _LAST_ROW_WEIGHT, 1, rows, dtype=torch.float32, device=keys.device
        )
        return self.attention_scores(
            window_queries, keys, scale, pool_kernel=1, row_weights=weights
        )

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """See `Policy.decide`; all KV heads keep the same tokens."""
        ranked = layer_score.clone()
        # The first before the others: fewer than four may have room beside the window.
        places = torch.arange(1, 1 + len(ranked[:_SINKS]), device=ranked.device)
        ranked[:_SINKS] = torch.finfo(ranked.dtype).max / places
        kept = self.best_tokens(ranked).repeat(len(head_scores), 1)
        context = len(ranked)
        count = max(self.kept_tokens - self.tail, int(context * self._share(layer)))
        if count == context:
            return LayerDecision(kept)
        return LayerDecision(kept, self.tokens_deeper(ranked, count + self.tail))

    def _share(self, layer: int) -> float:
        decay = self.config.decay_ratio
        fall = (1 - math.cos(math.pi * layer / self.num_layers)) / 2
        return 1 - (1 - decay) * fall
