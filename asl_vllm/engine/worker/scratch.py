"""One layer's worth of KV pages, reused for every layer of a pruned prefill.

Touch points: `create_kv_cache_views` and `KVCacheTensor`, which lay the pages out as
vLLM lays out its own, so that any backend reads and writes them unchanged.
"""

from __future__ import annotations

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)


class ScratchPages:
    """Pages for ``capacity`` tokens; row r of a sequence lives in slot r.

    Allocates its bytes at once, before the KV pool is sized; `lay_out` gives them
    the pool's layout once that is known. ``block_table`` [1, blocks] is the
    identity and ``slots`` [capacity] are the slot ids of the rows.
    """

    pages: torch.Tensor

    def __init__(
        self, spec: AttentionSpec, capacity: int, device: torch.device
    ) -> None:
        self._spec = spec
        self._num_blocks = cdiv(capacity, spec.block_size)
        self._raw = torch.empty(
            self._num_blocks * spec.page_size_bytes, dtype=torch.int8, device=device
        ).zero_()
        self.block_table = torch.arange(
            self._num_blocks, dtype=torch.int32, device=device
        )[None]
        self.slots = torch.arange(capacity, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes held by the pages."""
        return self._raw.numel()

    def lay_out(self, layout: KVCacheLayout, kernel_block_size: int) -> None:
        """Makes ``pages`` a view in the pool's layout."""
        page_size = self._spec.page_size_bytes
        tensor = KVCacheTensor(
            size=self._raw.numel(),
            layers=["scratch"],
            layer_stride=self._raw.numel(),
            block_stride=page_size,
        )
        (self.pages,) = create_kv_cache_views(
            self._raw,
            self._spec,
            self._num_blocks,
            layout,
            tensor,
            kernel_block_size=kernel_block_size,
        )
