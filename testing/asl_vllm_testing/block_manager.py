"""vLLM's block manager over one band of pruned blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
)
from vllm.v1.request import Request

from asl_vllm.engine.kv_spec import prunable
from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager

BLOCK = 16
SIZES = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32}
STOCK = FullAttentionSpec(**SIZES, dtype=torch.float32)
PRUNED = prunable(STOCK)


def manager(
    enable_caching: bool = True,
    blocks: int = 20,
    specs: Sequence[KVCacheSpec] = (PRUNED,),
) -> KVCacheManager:
    """With a group of one layer for each spec."""
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec([f"layer {index}"], spec)
            for index, spec in enumerate(specs)
        ],
    )
    return KVCacheManager(
        config,
        max_model_len=1024,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=enable_caching,
    )


def request(name: str, tokens: int, *, hashed: bool = True) -> Request:
    init_none_hash(sha256)
    return Request(
        request_id=name,
        prompt_token_ids=list(range(tokens)),
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256) if hashed else None,
    )


def pruned_blocks(host: KVCacheManager) -> PrunedBlocksManager:
    (only,) = host.coordinator.single_type_managers
    assert isinstance(only, PrunedBlocksManager)
    return only
