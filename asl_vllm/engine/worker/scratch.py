"""One layer's worth of KV pages, reused for every layer of a pruned prefill.

Touch points: `create_kv_cache_views` and `KVCacheTensor`, which lay the pages out as
vLLM lays out its own, so that any backend reads and writes them unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)

_TILES = {64: 128, 128: 128, 256: 80}
"""Keys that FlashAttention 3 takes at once under a causal mask, by the head's size, of
16 bits an element. From pages of whole tiles it copies keys with the hardware's bulk
copies (TMA), from others row by row, with threads that would compute."""


def scratch_spec(spec: AttentionSpec, impl: Any) -> AttentionSpec:
    """The pool's spec with pages of the size that the attention kernels like best.

    Whatever the pool's size of blocks is: a prefill alone reads these pages.
    """
    tile = _TILES.get(spec.head_size)
    quantised = spec.dtype.itemsize < 2
    if getattr(impl, "vllm_flash_attn_version", None) != 3 or quantised or not tile:
        return spec
    return spec.copy_with_new_block_size(tile)


class ScratchPages:
    """Pages for ``capacity`` tokens; row r of a sequence lives in slot r.

    Allocates its bytes at once, before the KV pool is sized; `lay_out` gives them
    the pool's layout once that is known, in pages of ``spec``. ``block_table``
    [1, blocks] is the identity and ``slots`` [capacity] are the slot ids of the rows.
    """

    pages: torch.Tensor

    def __init__(
        self, spec: AttentionSpec, capacity: int, device: torch.device
    ) -> None:
        self.spec = spec
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

    def lay_out(self, layout: KVCacheLayout) -> None:
        """Makes ``pages`` a view in the pool's layout."""
        page_size = self.spec.page_size_bytes
        tensor = KVCacheTensor(
            size=self._raw.numel(),
            layers=["scratch"],
            layer_stride=self._raw.numel(),
            block_stride=page_size,
        )
        (self.pages,) = create_kv_cache_views(
            self._raw,
            self.spec,
            self._num_blocks,
            layout,
            tensor,
            kernel_block_size=self.spec.block_size,
        )
