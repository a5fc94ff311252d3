"""Paged KV caches in the layouts of vLLM 0.32, made by hand.

`tests/contract/test_key_caches.py` checks that they are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
"""Names of `KVCacheLayout`, which are the order of the dimensions in memory.

Layers, blocks, KV heads, tokens of a block, and what is stored of a token: its keys,
then its values.
"""


def kv_cache(
    layout: str,
    *,
    layers: int,
    layer: int,
    blocks: int,
    kv_heads: int,
    block_size: int,
    content: int,
    dtype: torch.dtype,
) -> Tensor:
    """One layer's ``kv_cache`` ``[blocks, Hkv, block_size, content]``, all NaN."""
    sizes = {
        "L": layers,
        "B": blocks,
        "H": kv_heads,
        "N": block_size,
        "C": content,
    }
    memory = torch.full([sizes[name] for name in layout], float("nan"), dtype=dtype)
    return memory.permute([layout.index(name) for name in "LBHNC"])[layer]


def key_cache(cache: Tensor, dim: int) -> Tensor:
    """The keys in it, ``[blocks, block_size, Hkv, D]``."""
    return cache.transpose(1, 2)[..., :dim]


def fill(
    key_cache: Tensor, keys: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """Writes the keys of some requests to blocks at random; returns the block table.

    Block 0 is left out, and what no request needs of the table names no block at all.
    """
    blocks, block_size = key_cache.shape[:2]
    free = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
    columns = max(-(-len(rows) // block_size) for rows in keys) + 1
    table = torch.full((len(keys), columns), 1 << 30, dtype=torch.int32)
    for request, rows in enumerate(keys):
        for column, part in enumerate(rows.split(block_size)):
            block = free.pop()
            table[request, column] = block
            key_cache[block, : len(part)] = part
    return table
