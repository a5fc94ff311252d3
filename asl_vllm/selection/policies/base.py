"""What a policy is: told a layer's scores, it says what stays and what goes deeper."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.kept import kept_per_head, propagated_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class LayerDecision:
    """What becomes of a layer's tokens, which are counted from 0 in its own input."""

    kept: Tensor
    """int64 ``[Hkv, k]``, ascending: the tokens whose K and V each KV head keeps."""
    propagated: Tensor | None
    """int64 ``[k]``, ascending: the tokens that go deeper; None: all of them."""
    ratio: float | None
    """Rank variance relative to the first checked layer's; None: not checked."""


class Policy(abc.ABC):
    """Decides, layer by layer, for one prompt; not to be reused for another."""

    def __init__(self, config: AslConfig, *, num_layers: int, kept_tokens: int) -> None:
        """Sets the policy up for a prompt.

        Args:
            config: The options.
            num_layers: L, the model's depth.
            kept_tokens: k, tokens a layer keeps, the window included.

        Raises:
            ValueError: ``kept_tokens`` leaves nothing beside the window.
        """
        if kept_tokens <= config.window:
            raise ValueError(
                f"kept_tokens: got {kept_tokens}; allowed: above the window of "
                f"{config.window} tokens."
            )
        self.config = config
        self.num_layers = num_layers
        self.kept_tokens = kept_tokens

    @abc.abstractmethod
    def decide(
        self, layer: int, layer_score: Tensor, head_scores: Tensor
    ) -> LayerDecision:
        """Decides about a layer; called for each in turn until tokens are dropped.

        Args:
            layer: 0-based.
            layer_score: fp32 ``[M - W]``: head scores summed over all KV heads, of
                all tensor-parallel ranks.
            head_scores: fp32 ``[Hkv, M - W]`` of this rank's KV heads.

        Raises:
            SelectionError: The scores are not finite.
        """

    def _read(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        value: Tensor | None = None,
    ) -> float | None:
        """Reads ``value`` if the scores are finite: the layer's one host sync."""
        finite = layer_score.isfinite().all() & head_scores.isfinite().all()
        flag = finite.double()
        numbers = flag.reshape(1) if value is None else torch.stack([flag, value])
        is_finite, *rest = numbers.tolist()
        if not is_finite:
            raise SelectionError(
                f"layer {layer}: the attention scores are not finite; the model's "
                "queries or keys overflow, so no tokens can be selected."
            )
        return float(rest[0]) if rest else None

    def _kept(self, head_scores: Tensor) -> Tensor:
        return kept_per_head(head_scores, self.kept_tokens, self.config.window)

    def _propagated(self, layer_score: Tensor) -> Tensor:
        return propagated_tokens(layer_score, self.kept_tokens, self.config.window)
