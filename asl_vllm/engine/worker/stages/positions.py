"""Positions of text, as vLLM's runner gives them to a model.

A multimodal model may have several numbers for each (M-RoPE): of time, height and
width. In text they are equal, and so a pass gives a model as many.

Touch point: ``uses_mrope`` and ``mrope_num_dims`` of vLLM's `ModelConfig`.
"""

from __future__ import annotations

from typing import Any

import torch


def position_dimensions(model_config: Any) -> int:
    """Numbers that a position of the model has."""
    return int(model_config.mrope_num_dims) if model_config.uses_mrope else 1


def of_text(positions: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Positions [n] as the model takes them: [dimensions, n] where it has several."""
    return positions if dimensions == 1 else positions.expand(dimensions, -1)
