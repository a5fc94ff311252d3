"""The KV caches of vLLM's backends are those that the kernels are tested on."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)

from asl_kernels.window_scores import window_scores, window_scores_paged
from asl_vllm_testing.key_caches import LAYOUTS, fill, key_cache, kv_cache

BLOCKS, KV_HEADS, BLOCK_SIZE, DIM, LAYERS = 7, 2, 16, 48, 3
# The module of a backend, and the function there that writes to its cache.
BACKENDS = {
    "FlashAttention": ("flash_attn", "reshape_and_cache_flash"),
    "TritonAttention": ("triton_attn", "triton_reshape_and_cache_flash"),
}
PACKAGE = "vllm.v1.attention.backends"


def vllm_cache(layout: str, layer: int, dtype: torch.dtype) -> Tensor:
    """A layer's ``kv_cache`` as vLLM makes it."""
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=dtype
    )
    kind = KVCacheLayout[layout]
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, kind)
    size = LAYERS * BLOCKS * spec.page_size_bytes
    names = [f"layer{index}" for index in range(LAYERS)]
    tensor = KVCacheTensor(
        size=size, layers=names, layer_stride=layer_stride, block_stride=block_stride
    )
    raw = torch.zeros(size, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, BLOCKS, kind, tensor)[layer]


def test_no_layout_is_left_out() -> None:
    assert set(LAYOUTS) == set(KVCacheLayout.__members__)
    for name, (module, _) in BACKENDS.items():
        backend = getattr(
            importlib.import_module(f"{PACKAGE}.{module}"), f"{name}Backend"
        )
        # Any layout, that is.
        assert backend.supported_kv_cache_layouts() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_those_made_by_hand(layout: str, dtype: torch.dtype) -> None:
    for layer in range(LAYERS):
        theirs = vllm_cache(layout, layer, dtype)
        ours = kv_cache(
            layout,
            layers=LAYERS,
            layer=layer,
            blocks=BLOCKS,
            kv_heads=KV_HEADS,
            block_size=BLOCK_SIZE,
            content=2 * DIM,
            dtype=dtype,
        )
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        assert theirs.stride() == ours.stride()
        assert theirs.storage_offset() == ours.storage_offset()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_read_from_where_a_backend_writes_them(
    layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_name, writer = BACKENDS[name]
    module = importlib.import_module(f"{PACKAGE}.{module_name}")
    kind = getattr(module, f"{name}Impl")
    given: list[Any] = []
    # The CPU build has neither kernel: what they are given is looked at instead.
    monkeypatch.setattr(module, writer, lambda *args: given.extend(args), raising=False)
    impl = object.__new__(kind)
    impl.attn_type = AttentionType.DECODER
    impl.head_size = DIM
    impl.kv_cache_dtype = "auto"
    impl._is_per_token_head_quant = False
    impl._set_kv_ptr_range = False
    cache = vllm_cache(layout, 1, torch.float32)
    layer = SimpleNamespace(_k_scale=None, _v_scale=None)
    k = torch.randn(40, KV_HEADS, DIM)
    impl.do_kv_cache_update(layer, k, k, cache, torch.arange(40))
    theirs, ours = given[2], key_cache(cache, DIM)
    assert theirs.shape == ours.shape == (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM)
    assert theirs.stride() == ours.stride()
    assert theirs.data_ptr() == ours.data_ptr()

    table = fill(theirs, [k], torch.Generator().manual_seed(0))
    q = torch.randn(8, 2 * KV_HEADS, DIM)
    got = window_scores_paged(q, ours, table, (40,), scale=0.2, pool_kernel=3)
    assert torch.equal(got, window_scores(q, k, scale=0.2, pool_kernel=3))


def test_quantized_caches_have_dtypes_that_are_refused() -> None:
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE as dtypes

    readable = {torch.float32, torch.float16, torch.bfloat16}
    for name in ("fp8", "fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "nvfp4"):
        assert dtypes[name] not in readable, name
