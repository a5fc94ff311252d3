"""The memory of prefills, allocated once and lent to one prompt or pack at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asl_vllm.prefill.hidden import (
    DeviceHidden,
    HiddenPart,
    HiddenStates,
    HostHidden,
)
from asl_vllm.prefill.shape import ModelShape


@dataclass(frozen=True)
class Rows:
    """Where a prompt's rows are, in `PrefillBuffers`; see there."""

    hidden: HiddenStates
    keys: torch.Tensor
    values: torch.Tensor
    window_queries: torch.Tensor


class PrefillBuffers:
    """Hidden states of prompts, and one layer's keys and values.

    ``hidden``, `HiddenStates` of ``capacity`` rows; ``keys`` [capacity, Hkv, D] and
    ``values`` [capacity, Hkv, Dv], in the activations' dtype; ``window_queries``
    [packed * window, H, D], each prompt's after another's. Allocated before the engine
    sizes its KV pool, so a request can never make the process allocate more than this
    reservation.

    Args:
        shape: Sizes of the model.
        capacity: Tokens of the longest prompt.
        window: W.
        packed: Prompts that share the rows at most.
        host_chunk: None: hidden states on the device. Otherwise they are in host
            memory, and staged on the device this many rows at once.
    """

    def __init__(
        self,
        shape: ModelShape,
        capacity: int,
        window: int,
        *,
        packed: int = 1,
        host_chunk: int | None = None,
    ) -> None:
        def rows(n: int, *dims: int) -> torch.Tensor:
            # Zero-filled so that the pages are really taken before the pool is sized.
            tensor = torch.empty((n, *dims), dtype=shape.dtype, device=shape.device)
            return tensor.zero_()

        self.capacity = capacity
        self.hidden: HiddenStates = (
            DeviceHidden(shape, capacity)
            if host_chunk is None
            else HostHidden(shape, capacity, host_chunk)
        )
        self.keys = rows(capacity, shape.num_kv_heads, shape.head_dim)
        self.values = rows(capacity, shape.num_kv_heads, shape.value_dim)
        self.window = window
        self.packed = packed
        self.window_queries = rows(packed * window, shape.num_heads, shape.head_dim)

    def part(self, first: int, place: int) -> Rows:
        """What a prompt is lent whose row 0 is row ``first``, the ``place``-th of all.

        It may use as many rows as it has and no more.
        """
        window = slice(place * self.window, (place + 1) * self.window)
        return Rows(
            HiddenPart(self.hidden, first) if first else self.hidden,
            self.keys[first:],
            self.values[first:],
            self.window_queries[window],
        )

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        tensors = (self.keys, self.values, self.window_queries)
        return self.hidden.device_bytes + sum(t.nbytes for t in tensors)

    @property
    def host_bytes(self) -> int:
        """Bytes held in host memory because ``host_chunk`` was given."""
        return self.hidden.host_bytes
