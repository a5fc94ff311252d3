"""KV-cache specs, their registry, block managers and the block pool."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import pytest
import torch
from vllm.v1 import kv_cache_spec_registry
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_capacity,
)
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.gpu_worker import record_kv_cache_layout

from asl_vllm.engine.kv_spec import (
    PrunedAttentionSpec,
    WindowSpec,
    in_bands,
    prunable,
    without_idle_windows,
)
from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager
from asl_vllm.engine.scheduler.integrity import IntegrityError, check_integrity
from asl_vllm.engine.settings import settings_of
from asl_vllm.prefill import Bands
from asl_vllm_testing.block_manager import (
    BLOCK,
    PRUNED,
    SIZES,
    STOCK,
    manager,
    pruned_blocks,
    request,
)
from asl_vllm_testing.moved import get_kv_cache_config_from_groups, get_kv_cache_groups
from asl_vllm_testing.vllm_configs import engine_config
from tests.contract.looking import parameters, source

SKIPPING = (
    "get_num_blocks_to_allocate",
    "add_local_computed_blocks",
    "allocate_external_computed_blocks",
    "remove_skipped_blocks",
)
"""Methods whose answer depends on the leading blocks that a request lacks."""


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kv_cache_spec_registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    yield


@pytest.mark.usefixtures("empty_registry")
def test_vllm_registers_its_specs_only_while_there_are_none() -> None:
    """The trap: ours alone in the registry would keep vLLM's out of it."""
    KVCacheSpecRegistry.register(PrunedAttentionSpec, PrunedBlocksManager)
    assert KVCacheSpecRegistry.get_manager_class(STOCK) is None


@pytest.mark.usefixtures("empty_registry")
def test_an_empty_check_registers_vllms_specs() -> None:
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    assert KVCacheSpecRegistry.get_manager_class(STOCK) is FullAttentionManager


def test_both_kinds_of_spec_are_registered() -> None:
    assert KVCacheSpecRegistry.get_manager_class(STOCK) is FullAttentionManager
    assert KVCacheSpecRegistry.get_manager_class(PRUNED) is PrunedBlocksManager
    base = KVCacheSpecRegistry.get_uniform_type_base_spec
    assert base(STOCK) is base(PRUNED) is FullAttentionSpec
    assert PRUNED.is_uniform_with_collection({"a": PRUNED, "b": STOCK})


def test_full_attention_spec_fields_are_all_init_fields() -> None:
    """`prunable` hands them all to another class."""
    assert issubclass(FullAttentionSpec, AttentionSpec)
    assert all(field.init for field in dataclasses.fields(FullAttentionSpec))
    assert PRUNED.page_size_bytes == STOCK.page_size_bytes
    assert dataclasses.asdict(PRUNED) == {**dataclasses.asdict(STOCK), "band": 0}


def banded(num_layers: int, bands: int) -> dict[str, KVCacheSpec]:
    names = [f"model.layers.{layer}" for layer in range(num_layers)]
    return in_bands(dict.fromkeys(names, PRUNED), Bands(num_layers, bands), names)


@pytest.mark.parametrize("bands", [1, 2, 5, 10])
def test_a_band_becomes_a_group(bands: int) -> None:
    config = engine_config({"policy": "asl", "bands": bands}, block_size=32)
    record_kv_cache_layout(config.cache_config, "LBHNC")
    groups = get_kv_cache_groups(config, banded(10, bands))
    split = Bands(10, bands)
    assert [group.layer_names for group in groups] == [
        [f"model.layers.{layer}" for layer in range(10) if split.of(layer) == band]
        for band in range(bands)
    ]
    assert [group.kv_cache_spec.band for group in groups] == list(range(bands))
    # As many blocks as without bands take G times as little memory, so vLLM makes G
    # times as many; what it says the pool holds is the same.
    page = PRUNED.page_size_bytes
    made = get_kv_cache_config_from_groups(config, groups, 1000 * 10 * page)
    assert made.num_blocks == 1000 * bands
    config.cache_config.num_gpu_blocks = made.num_blocks
    tokens, _ = get_kv_cache_capacity(config, made)
    assert tokens == pytest.approx(1000 * BLOCK, rel=0.02)


def test_layers_of_different_bands_have_no_spec_in_common() -> None:
    specs = list(banded(4, 2).values())
    assert PrunedAttentionSpec.merge(specs[:2]) == specs[0]
    assert PrunedAttentionSpec.merge(specs[2:]).band == 1
    with pytest.raises(AssertionError, match="different bands"):
        PrunedAttentionSpec.merge(specs)


def test_blocks_are_freed_when_pruned_after_they_were_taken() -> None:
    host = manager()
    work = request("a", 10 * BLOCK + 3, hashed=False)
    blocks = pruned_blocks(host)
    blocks.set_pruned_blocks("a", 0)
    assert host.allocate_slots(
        work, 0, num_external_computed_tokens=work.num_tokens - 1
    )
    (ids,) = host.get_blocks("a").get_block_ids()
    assert 0 not in ids
    blocks.set_pruned_blocks("a", 8)
    work.num_computed_tokens = work.num_tokens - 1
    assert host.allocate_slots(work, 1) is not None
    (left,) = host.get_blocks("a").get_block_ids()
    assert left == [0] * 8 + ids[8:]
    assert host.block_pool.get_num_free_blocks() == 19 - 3


def test_windows_are_held_as_vllm_holds_them_and_stay_out_of_the_prefix_cache() -> None:
    window = SlidingWindowSpec(**SIZES, dtype=torch.float32, sliding_window=3 * BLOCK)
    rows = []
    for specs in ((STOCK, window), (PRUNED, prunable(window))):
        # vLLM's own would cache what has no hashes.
        host = manager(specs[0] is PRUNED, blocks=40, specs=specs)
        work = request("a", 10 * BLOCK + 3, hashed=False)
        first = host.coordinator.single_type_managers[0]
        if isinstance(first, PrunedBlocksManager):
            first.set_pruned_blocks("a", 4)
        external = work.num_tokens - 1
        assert host.allocate_slots(work, 0, num_external_computed_tokens=external)
        row = host.coordinator.single_type_managers[1].req_to_blocks["a"]
        rows.append([block.is_null for block in row])
        assert not any(block.block_hash for block in host.block_pool.blocks)
    assert rows[0] == rows[1] == [True] * 7 + [False] * 4
    check_integrity(host)
    row[8] = row[0]
    with pytest.raises(IntegrityError, match="of a sliding window has null blocks at"):
        check_integrity(host)


def test_a_window_of_the_longest_sequence_is_full_attention() -> None:
    settings = settings_of(engine_config({"policy": "asl"}, max_model_len=256))
    shorter, longest = (
        prunable(SlidingWindowSpec(**SIZES, dtype=torch.float32, sliding_window=window))
        for window in (255, 256)
    )
    specs = without_idle_windows({"a": PRUNED, "b": shorter, "c": longest}, settings)
    assert specs == {"a": PRUNED, "b": shorter, "c": PRUNED}


def test_other_specs_are_no_plain_full_attention() -> None:
    window = SlidingWindowSpec(**SIZES, dtype=torch.float32, sliding_window=64)
    ours = prunable(window)
    assert type(ours) is WindowSpec
    assert ours.sliding_window == 64
    assert prunable(ours) is ours
    assert prunable(PRUNED) is PRUNED


def test_max_memory_usage_bytes_is_asked_before_and_after_the_pool_is_sized() -> None:
    assert parameters(FullAttentionSpec.max_memory_usage_bytes) == (
        "self",
        "vllm_config",
    )
    config = engine_config({"policy": "asl"}, max_model_len=1024, block_size=32)
    assert config.cache_config.num_gpu_blocks is None
    stock = STOCK.max_memory_usage_bytes(config)
    assert stock == 1024 // BLOCK * STOCK.page_size_bytes
    # The window of 32 and a block of 16, in blocks, and one to write in.
    assert PRUNED.max_memory_usage_bytes(config) == 4 * PRUNED.page_size_bytes
    config.cache_config.num_gpu_blocks = 10
    assert PRUNED.max_memory_usage_bytes(config) == stock


def test_no_other_method_asks_for_skipped_tokens() -> None:
    """One that did would be told 0 by `PrunedBlocksManager`.

    In vLLM's text, since it says what no method does; what these four answer for a
    pruned request is tested below.
    """
    for name in SKIPPING:
        method = getattr(FullAttentionManager, name)
        assert parameters(method)[:2] == ("self", "request_id")
    asking = {
        name
        for owner in (FullAttentionManager, SingleTypeKVCacheManager)
        for name, method in vars(owner).items()
        if inspect.isfunction(method)
        and "self.get_num_skipped_tokens(" in source(method)
    }
    assert asking == set(SKIPPING)


def test_full_attention_manager() -> None:
    assert issubclass(FullAttentionManager, SingleTypeKVCacheManager)
    assert FullAttentionManager.get_num_skipped_tokens is (
        SingleTypeKVCacheManager.get_num_skipped_tokens
    )
    assert parameters(FullAttentionManager.get_num_skipped_tokens) == (
        "self",
        "num_computed_tokens",
    )
    assert parameters(FullAttentionManager.cache_blocks)[:2] == ("self", "request")
    assert pruned_blocks(manager()).block_size == BLOCK


def test_the_null_block_has_id_0() -> None:
    """The block-table view takes 0 for a block that is not there."""
    pool = manager().block_pool
    assert pool.null_block.block_id == 0
    assert pool.num_gpu_blocks == 20
    assert pool.get_num_free_blocks() == 19


def test_the_books_of_the_pool() -> None:
    """What `scheduler/integrity.py` reads; its own tests change each of these."""
    pool = manager().block_pool
    queue = pool.free_block_queue
    first = queue.fake_free_list_head.next_free_block
    assert first is pool.blocks[1]
    assert pool.blocks[-1].next_free_block is queue.fake_free_list_tail
    assert queue.num_free_blocks == 19
    assert (first.ref_cnt, first.is_null, first.block_hash) == (0, False, None)
    assert pool.cached_block_hash_to_block._cache == {}
    assert pool.cached_block_hashes_by_block == {}
    assert pruned_blocks(manager()).req_to_blocks == {}


@pytest.mark.parametrize("enable_caching", [True, False])
def test_pruned_tokens_occupy_null_blocks(enable_caching: bool) -> None:
    """From admission to release, as the scheduler does it."""
    host = manager(enable_caching)
    work = request("a", 10 * BLOCK + 3, hashed=False)
    pruned_blocks(host).set_pruned_blocks("a", 8)
    held = host.allocate_slots(
        work,
        0,
        num_external_computed_tokens=work.num_tokens - 1,
        delay_cache_blocks=True,
    )
    assert held is not None
    (ids,) = host.get_blocks("a").get_block_ids()
    assert ids[:8] == [0] * 8
    assert 0 not in ids[8:]
    assert len(ids) == 11
    assert host.block_pool.get_num_free_blocks() == 19 - 3
    # Loaded; the last prompt token follows, then generated ones.
    work.num_computed_tokens = work.num_tokens - 1
    for _ in range(2 * BLOCK):
        assert host.allocate_slots(work, 1) is not None
        work.append_output_token_ids(7)
        work.num_computed_tokens += 1
    (ids,) = host.get_blocks("a").get_block_ids()
    assert ids[:8] == [0] * 8
    assert len(ids) == 13
    host.free(work)
    pruned_blocks(host).forget("a")
    assert host.block_pool.get_num_free_blocks() == 19


def test_a_prompt_larger_than_the_pool_is_admitted_when_pruned() -> None:
    host = manager(blocks=6)
    work = request("a", 40 * BLOCK, hashed=False)
    pruned_blocks(host).set_pruned_blocks("a", 37)
    assert host.allocate_slots(
        work,
        0,
        num_external_computed_tokens=work.num_tokens - 1,
        full_sequence_must_fit=True,
    )


def test_without_hashes_a_request_stays_out_of_the_prefix_cache() -> None:
    host = manager()
    first = request("first", 5 * BLOCK)
    assert host.allocate_slots(first, first.num_tokens) is not None
    again = request("again", 5 * BLOCK)
    assert host.get_computed_blocks(again)[1] == 4 * BLOCK
    again.block_hashes = []
    again._block_hasher = None
    assert host.get_computed_blocks(again)[1] == 0
    again.append_output_token_ids([1] * BLOCK)
    assert again.block_hashes == []


def test_a_pruned_request_fills_no_prefix_cache() -> None:
    host = manager()
    work = request("a", 5 * BLOCK)
    pruned_blocks(host).set_pruned_blocks("a", 2)
    assert host.allocate_slots(
        work, 0, num_external_computed_tokens=work.num_tokens - 1
    )
    host.cache_blocks(work, work.num_tokens - 1)
    assert host.get_computed_blocks(request("b", 5 * BLOCK))[1] == 0


def test_request_fields() -> None:
    work = request("a", 5)
    assert work.num_prompt_tokens == 5
    assert work.prompt_token_ids == [0, 1, 2, 3, 4]
    assert work.sampling_params is not None
    assert callable(work._block_hasher)
    assert isinstance(work.block_hashes, list)
