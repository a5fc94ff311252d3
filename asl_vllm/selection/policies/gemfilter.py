"""GemFilter: early layers select the tokens, which then are the whole prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.selection.policies.base import Keep, LayerDecision, Policy

_REFERENCE_LAYER = 13
"""Of Llama 3.1 8B's 32 layers, as published."""
_POOL_KERNEL = 5
"""Of the published implementation."""


class GemFilterPolicy(Policy):
    """Filters the prompt's tokens at one layer (arXiv 2409.17422, algorithm 1).

    The filter layer is ``selection_layer`` or 13/32 of the depth. The k tokens with the
    largest dot products with the last token's query go through the model again from
    layer 0, as a prompt without the others. The last token is always one of them.
    """

    restarts = True

    def __init__(self, config: AslConfig, *, num_layers: int, kept_tokens: int) -> None:
        """See `Policy`."""
        super().__init__(config, num_layers=num_layers, kept_tokens=kept_tokens)
        self._layer = config.resolved_selection_layer(num_layers, _REFERENCE_LAYER)
        self.tail = 1

    @classmethod
    def most_deeper(cls, config: AslConfig, num_tokens: int, kept_tokens: int) -> int:
        """See `Policy.most_deeper`: all that start over."""
        return kept_tokens

    def score(
        self, layer: int, window_queries: Tensor, keys: Tensor, scale: float
    ) -> tuple[Tensor, Tensor] | None:
        """The last query's dot products, without softmax, averaged over neighbours."""
        if layer != self._layer:
            return None
        tokens, kv_heads, _ = keys.shape
        # A group's products add up to the product with its queries' sum.
        last = window_queries[-1].float()
        queries = last.reshape(kv_heads, -1, last.shape[-1]).sum(1)
        products = torch.empty(
            kv_heads, tokens, dtype=torch.float32, device=keys.device
        )
        for head in range(kv_heads):  # one head's keys in fp32 at a time
            torch.mv(keys[:, head].float(), queries[head], out=products[head])
        pooled = F.avg_pool1d(products, _POOL_KERNEL, 1, padding=_POOL_KERNEL // 2)
        head_scores = pooled[:, : -self.tail]
        return head_scores, head_scores.sum(0)

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """See `Policy.decide`; asked about the filter layer only."""
        tokens = self.best_tokens(layer_score)
        return LayerDecision(Keep.NONE, tokens, restart=True)
