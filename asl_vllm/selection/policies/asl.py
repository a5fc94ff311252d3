"""ASL: selects at the first layer whose ranks have settled."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.selection.policies.base import Keep, LayerDecision, Policy
from asl_vllm.selection.settling import RankHistory


class AslPolicy(Policy):
    """Adaptive layer selection (arXiv 2601.07667, section 3).

    The selection layer is the first whose rank variance falls below ``tau`` times
    the first checked layer's, or ``selection_layer`` where the config fixes it. The
    tokens that go deeper have the largest scores there, or in one of ``score_layers``
    that end there (this repository's).
    """

    selects_once = True

    def __init__(self, config: AslConfig, *, num_layers: int, kept_tokens: int) -> None:
        """See `Policy`."""
        super().__init__(config, num_layers=num_layers, kept_tokens=kept_tokens)
        self._selected = False
        self._tau = config.resolved_tau(num_layers)
        self._history = RankHistory(
            l_min=config.resolved_l_min(num_layers),
            l_obs=config.resolved_l_obs(num_layers),
            top=kept_tokens - config.window,
        )
        self._recent: deque[Tensor] = deque(maxlen=config.score_layers)

    @classmethod
    def most_deeper(cls, config: AslConfig, num_tokens: int, kept_tokens: int) -> int:
        """See `Policy.most_deeper`."""
        return kept_tokens

    def observe(self, layer: int, layer_score: Tensor) -> Tensor | None:
        """The rank variance of a checked layer, fp64; see `Policy.observe`."""
        if self._selected or self.config.selection_layer is not None:
            return None
        return self._history.observe(layer, layer_score)

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """See `Policy.decide`."""
        ratio = None if observed is None else self._history.ratio(observed)
        settled = ratio is not None and ratio < self._tau
        selects = settled or layer == self.config.selection_layer
        # Deeper layers are asked again where more than k tokens pass them.
        self._selected |= selects
        self._recent.append(layer_score)
        return LayerDecision(
            self.best_per_head(head_scores),
            self._tokens_lately() if selects else Keep.ALL,
            ratio,
        )

    def _tokens_lately(self) -> Tensor | Keep:
        """By each token's largest score of the recent layers."""
        return self.tokens_deeper(torch.stack(tuple(self._recent)).amax(0))
