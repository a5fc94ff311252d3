"""Sizes of a model, as far as a prefill needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShape:
    """Sizes of this rank's part of the model; the dtype is the activations'."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    def bytes_per_token(self) -> int:
        """Bytes a prompt token holds in `PrefillBuffers` while it is prefilled."""
        width = self.hidden_size + self.num_kv_heads * (self.head_dim + self.value_dim)
        return width * self.dtype.itemsize
