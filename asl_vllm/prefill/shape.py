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
    windows: tuple[int | None, ...] = ()
    """Tokens that each layer sees, the newest included; None: all of them. Empty: all
    layers see all."""
    groups: tuple[int, ...] = ()
    """Row of a job's `block_ids`, or of its `window_blocks`, that holds each layer's
    blocks; empty unless there are windows."""

    @property
    def scored_layers(self) -> tuple[int, ...]:
        """Layers that see all tokens, from which tokens are selected."""
        if not self.windows:
            return tuple(range(self.num_layers))
        return tuple(i for i, window in enumerate(self.windows) if window is None)

    @property
    def widest_window(self) -> int:
        """Tokens of the widest sliding window; 0: there is none."""
        return max((window or 0 for window in self.windows), default=0)

    @property
    def window_groups(self) -> int:
        """Rows of a job's `window_blocks`."""
        rows = zip(self.groups, self.windows, strict=True)
        return len({group for group, window in rows if window})

    @property
    def full_groups(self) -> int:
        """Rows of its `block_ids`, where ``groups`` says which."""
        rows = zip(self.groups, self.windows, strict=True)
        return len({group for group, window in rows if window is None})

    def bytes_per_token(self) -> int:
        """Bytes a prompt token holds in `PrefillBuffers` while it is prefilled."""
        width = self.hidden_size + self.num_kv_heads * (self.head_dim + self.value_dim)
        return width * self.dtype.itemsize
