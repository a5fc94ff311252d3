"""What a way of calling single layers can do."""

from __future__ import annotations

from typing import Protocol

import torch


class NoResidualError(Exception):
    """A layer hands on no residual that could be added."""


class Stages(Protocol):
    """One way of calling a model's layers; needs a forward context around each call.

    Between two layers a token's state is one row of E numbers. Positions are as the
    model takes them (`positions.of_text`). Whatever a call changes in vLLM is as it was
    when the call returns or raises.
    """

    name: str
    """For logs, refusals and docs/models.md."""

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids [n] at positions [n] -> states [n, E] that enter layer 0."""
        ...

    def run(self, layer: int, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """Replaces states [n, E] by the layer's output.

        Raises:
            NoResidualError: the way adds one, and the layer has none.
        """
        ...
