"""The memory of a prefill, allocated once and lent to one prompt at a time."""

from __future__ import annotations

import torch

from asl_vllm.prefill.shape import ModelShape


class PrefillBuffers:
    """Hidden states of one prompt, and one layer's keys and values.

    ``hidden`` [capacity, E], ``keys`` [capacity, Hkv, D], ``values``
    [capacity, Hkv, Dv], in the activations' dtype; ``window_queries``
    [window, H, D]. Allocated before the engine sizes its KV pool, so a request can
    never make the process allocate more than this reservation.
    """

    def __init__(self, shape: ModelShape, capacity: int, window: int) -> None:
        def rows(n: int, *dims: int) -> torch.Tensor:
            # Zero-filled so that the pages are really taken before the pool is sized.
            tensor = torch.empty((n, *dims), dtype=shape.dtype, device=shape.device)
            return tensor.zero_()

        self.capacity = capacity
        self.hidden = rows(capacity, shape.hidden_size)
        self.keys = rows(capacity, shape.num_kv_heads, shape.head_dim)
        self.values = rows(capacity, shape.num_kv_heads, shape.value_dim)
        self.window_queries = rows(window, shape.num_heads, shape.head_dim)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        tensors = (self.hidden, self.keys, self.values, self.window_queries)
        return sum(t.numel() * t.element_size() for t in tensors)
