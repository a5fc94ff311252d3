"""Attention backends, their registry and their metadata."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import (
    get_attention_context,
    unified_kv_cache_update,
)
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.utils import customize_attention_spec

from asl_vllm.engine.kv_spec import PrunedAttentionSpec
from asl_vllm.engine.worker import attention
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import parameters, source

BACKENDS = sorted(attention.WRAPPED_BACKENDS)
METADATA = {
    "CPU_ATTN": "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadata",
    "FLASH_ATTN": "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadata",
    "TRITON_ATTN": "vllm.v1.attention.backends.triton_attn.TritonAttentionMetadata",
}


@pytest.fixture(autouse=True)
def own_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})


def stock(name: str) -> Any:
    return resolve_obj_by_qualname(attention.WRAPPED_BACKENDS[name])


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_where_the_registry_says(name: str) -> None:
    assert AttentionBackendEnum[name].value == attention.WRAPPED_BACKENDS[name]
    assert issubclass(stock(name), AttentionBackend)
    # An attention layer finds its enum entry by this name again.
    assert stock(name).get_name() == name
    assert attention.wrapped_backend(name).get_name() == name  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_can_be_overridden_by_path(name: str) -> None:
    backend = AttentionBackendEnum[name]
    assert parameters(register_backend)[:2] == ("backend", "class_path")
    attention.install()
    assert backend.get_class() is attention.wrapped_backend(name)
    backend.clear_override()
    assert backend.get_class() is stock(name)


def test_the_cpu_platform_looks_at_cpu_attn_only() -> None:
    """Why CUSTOM cannot be used and the entry itself is overridden."""
    attention.install()
    chosen = CpuPlatform.get_attn_backend_cls(
        AttentionBackendEnum.CUSTOM,
        SimpleNamespace(use_sparse=False, use_mla=False, kv_cache_dtype="auto"),
    )
    assert chosen == "asl_vllm.engine.worker.attention.Asl_CPU_ATTN"


@pytest.mark.parametrize("name", BACKENDS)
def test_implementations_update_the_cache_in_a_call_of_its_own(name: str) -> None:
    """Keys and values are tapped there, and kept rows are written through it."""
    assert stock(name).forward_includes_kv_cache_update is False
    impl = stock(name).get_impl_cls()
    assert parameters(impl.do_kv_cache_update) == (
        *("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
    )
    assert parameters(impl.forward)[:5] == ("self", "layer", "query", "key", "value")
    assert "self.scale = " in source(impl.__init__), "two of three need a GPU"


@pytest.mark.parametrize("name", BACKENDS)
def test_builders(name: str) -> None:
    builder = stock(name).get_builder_cls()
    assert parameters(builder.build) == (
        *("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    )
    assert parameters(builder.__init__) == (
        *("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
    )
    assert hasattr(builder, "supports_update_block_table")


def test_flash_attention_has_a_limit_of_splits() -> None:
    """That passes lift: captured graphs set it, and then 268 MB hold partial sums."""
    builder = stock("FLASH_ATTN").get_builder_cls()
    assert "max_num_splits" in builder.__init__.__code__.co_names
    assert "max_num_splits" in builder.build.__code__.co_names


@pytest.mark.parametrize("name", BACKENDS)
def test_metadata_has_a_slot_mapping(name: str) -> None:
    metadata = resolve_obj_by_qualname(METADATA[name])
    assert "slot_mapping" in {field.name for field in dataclasses.fields(metadata)}


@pytest.mark.parametrize("name", BACKENDS)
def test_customize_spec_chooses_the_layers_spec(name: str) -> None:
    spec = FullAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16
    )
    backend: Any = attention.wrapped_backend(name)
    assert type(customize_attention_spec(backend, spec)) is PrunedAttentionSpec
    assert type(customize_attention_spec(stock(name), spec)) is FullAttentionSpec


def test_common_metadata_fields() -> None:
    fields = {
        field.name: field for field in dataclasses.fields(CommonAttentionMetadata)
    }
    required = {
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING
    }
    # What `VllmDecoder` gives; another required field would fail its first pass.
    assert required == {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
    }
    assert {"seq_lens_cpu_upper_bound", "_num_computed_tokens_cache"} <= fields.keys()


def test_common_metadata_is_replaced_not_changed() -> None:
    lengths = torch.tensor([5], dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=1,
        num_actual_tokens=1,
        max_query_len=1,
        max_seq_len=5,
        block_table_tensor=torch.zeros(1, 2, dtype=torch.int32),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
    )
    assert common.compute_num_computed_tokens().tolist() == [4]
    shorter = common.replace(seq_lens=lengths - 2, _num_computed_tokens_cache=None)
    assert shorter.compute_num_computed_tokens().tolist() == [2]
    assert common.seq_lens.tolist() == [5]


def test_a_layer_finds_its_cache_and_slots_in_the_forward_context() -> None:
    """And hands both to its implementation, where keys and values are tapped."""
    layer = Mock(kv_cache=torch.zeros(1))
    slots, metadata = torch.zeros(2, dtype=torch.int64), object()
    context = create_forward_context(
        {"a": metadata}, engine_config(), slot_mapping={"a": slots}
    )
    context.no_compile_layers = {"a": layer}
    key, value = torch.zeros(2, 1, 4), torch.ones(2, 1, 4)
    with override_forward_context(context):
        assert get_attention_context("a") == (metadata, layer, layer.kv_cache, slots)
        unified_kv_cache_update(key, value, "a")
    layer.impl.do_kv_cache_update.assert_called_once_with(
        layer, key, value, layer.kv_cache, slots
    )


def test_attention_layer_attributes() -> None:
    config = engine_config()
    with set_current_vllm_config(config):
        layer = Attention(4, 64, 0.125, num_kv_heads=2, prefix="model.layers.0.attn")
    assert layer.layer_name == "model.layers.0.attn"
    assert (layer.num_heads, layer.num_kv_heads) == (4, 2)
    assert (layer.head_size, layer.head_size_v) == (64, 64)
    assert layer.attn_backend is stock("CPU_ATTN")
    assert isinstance(layer.impl, layer.attn_backend.get_impl_cls())
    assert layer.impl.scale == 0.125
    assert layer.kv_cache is not None
