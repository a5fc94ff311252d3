"""The models whose layers are called, and what a layer needs around it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import forward_context, ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import set_forward_context
from vllm.ir.op import IrOp
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.attention.ops import triton_reshape_and_cache_flash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)

from asl_vllm.engine.worker import ranks as ranks_module
from asl_vllm.engine.worker.ranks import Ranks
from asl_vllm.engine.worker.scratch import ScratchPages, scratch_spec
from asl_vllm.prefill import Verdict
from asl_vllm_testing.vllm_configs import LLAMA_SIZES, engine_config, model_dir
from tests.contract.looking import parameters

LAYERS = {
    "LlamaForCausalLM": ("llama", "LlamaDecoderLayer", "LlamaAttention"),
    "MistralForCausalLM": ("mistral", "MistralDecoderLayer", "MistralAttention"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2DecoderLayer", "Qwen2Attention"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3DecoderLayer", "Qwen3Attention"),
}


def model_class(architecture: str, name: str) -> type:
    module = f"vllm.model_executor.models.{LAYERS[architecture][0]}"
    found: type = getattr(importlib.import_module(module), name)
    return found


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tensor parallelism of one, which layers ask for when they are made."""
    store = tmp_path_factory.mktemp("store") / "file"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel()
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def model(one_rank: None, architecture: str, tmp_path: Path) -> Any:
    """A small model of an architecture, with random weights."""
    kind = LAYERS[architecture][0]
    folder = model_dir(
        tmp_path / "model",
        architectures=[architecture],
        model_type=kind,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        **LLAMA_SIZES,
    )
    config = engine_config(model=folder)
    with set_current_vllm_config(config):
        made = model_class(architecture, architecture)(vllm_config=config)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    process_weights_after_loading(made, config.model_config, torch.device("cpu"))
    return made


@pytest.mark.parametrize("architecture", sorted(LAYERS))
@torch.inference_mode()
def test_layers_called_one_at_a_time(model: Any, architecture: str) -> None:
    """As (positions, states, None): the sum of what comes out enters the next."""
    _, decoder_layer, attention = LAYERS[architecture]
    ids = torch.tensor([5, 6, 7])
    embedded = model.embed_input_ids(ids)
    assert embedded.shape == (3, LLAMA_SIZES["hidden_size"])
    assert len(model.model.layers) == LLAMA_SIZES["num_hidden_layers"]
    for layer in model.model.layers:
        assert type(layer) is model_class(architecture, decoder_layer)
        assert type(layer.self_attn) is model_class(architecture, attention)
        assert isinstance(layer.self_attn.attn, Attention)
        # Its cache is not what this is about.
        layer.self_attn.attn.forward = lambda q, *_: q.clone()
    positions = torch.arange(3)
    states, residual = embedded, None
    summed = embedded.clone()
    for layer in model.model.layers:
        states, residual = layer(positions, states.clone(), residual)
        summed = sum(layer(positions, summed, None))
    assert not torch.allclose(summed, embedded, atol=0.1)
    torch.testing.assert_close(summed, states + residual, rtol=1e-4, atol=1e-4)


def test_set_forward_context() -> None:
    names = parameters(set_forward_context)
    assert names[:3] == ("attn_metadata", "vllm_config", "num_tokens")
    assert "slot_mapping" in names


def test_a_forward_context_of_a_moe_model_waits_for_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why expert parallelism across data-parallel ranks is refused."""

    class Waited(Exception):
        pass

    def wait(**_: Any) -> None:
        raise Waited

    monkeypatch.setattr(forward_context, "coordinate_batch_across_dp", wait)
    config = engine_config()
    config.parallel_config.data_parallel_size = 2
    for is_moe, expected in ((True, pytest.raises(Waited)), (False, nullcontext())):
        config.parallel_config.is_moe_model = is_moe
        with expected, set_forward_context({}, config, num_tokens=8):
            pass


ONE, TWO = bytes(range(32)), bytes(range(1, 33))


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        ((False, ONE), (False, ONE), Verdict.SAME),
        ((False, b""), (False, b""), Verdict.SAME),
        ((False, ONE), (False, TWO), Verdict.DIFFERENT),
        ((False, b""), (False, bytes(32)), Verdict.DIFFERENT),
        ((True, b""), (False, ONE), Verdict.FAILED),
        ((False, ONE), (True, b""), Verdict.FAILED),
        ((True, b""), (True, b""), Verdict.FAILED),
    ],
)
def test_an_exchange_is_one_all_reduce(
    monkeypatch: pytest.MonkeyPatch,
    mine: tuple[bool, bytes],
    theirs: tuple[bool, bytes],
    verdict: Verdict,
) -> None:
    """Both ranks get the greatest of what they send, over the CPU group."""
    group = SimpleNamespace(world_size=2, cpu_group="group")
    monkeypatch.setattr(ranks_module, "get_tp_group", lambda: group)
    sent: list[torch.Tensor] = []

    def note(tensor: torch.Tensor, operation: Any, group: Any) -> None:
        assert (operation, group) == (torch.distributed.ReduceOp.MAX, "group")
        sent.append(tensor.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", note)
    Ranks().exchange(*theirs)

    def all_reduce(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        tensor.copy_(torch.maximum(tensor, sent[0]))
        sent.append(tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert Ranks().exchange(*mine) is verdict
    assert len(sent) == 2


def test_a_custom_op_runs_what_its_instance_names() -> None:
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(4)
    assert norm._forward_method in (norm.forward_native, norm.forward_cpu)
    norm.__dict__["_forward_method"] = lambda x: ("own", x)
    assert norm(7) == ("own", 7)


def test_operations_have_kernels_by_priority() -> None:
    for name in ("rms_norm", "fused_add_rms_norm"):
        operation = IrOp.registry[name]
        assert operation is getattr(ir.ops, name)
        assert {"native", "vllm_c"} <= operation.impls.keys()
        before = operation.get_priority()
        with operation.set_priority(["native"]):
            assert operation.get_priority() == ["native"]
        assert operation.get_priority() == before
    assert parameters(ir.enable_torch_wrap) == ("enable",)


def test_kernels_write_nothing_to_the_padding_slot() -> None:
    assert PAD_SLOT_ID < 0
    assert "if slot_idx < 0:" in inspect.getsource(triton_reshape_and_cache_flash)


def test_all_reduce_takes_a_tensor() -> None:
    assert parameters(tensor_model_parallel_all_reduce) == ("input_",)


def test_the_tensor_parallel_group(one_rank: None) -> None:
    assert parameters(get_tp_group) == ()
    group = get_tp_group()
    assert group.world_size == 1
    assert torch.distributed.get_world_size(group.cpu_group) == 1


def test_kv_cache_tensor_and_views() -> None:
    assert parameters(create_kv_cache_views) == (
        "raw",
        "spec",
        "num_blocks",
        "layout",
        "kv_cache_tensor",
        "kernel_block_size",
    )
    assert parameters(KVCacheTensor)[:4] == (
        "size",
        "layers",
        "layer_stride",
        "block_stride",
    )


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
def test_scratch_pages_in_the_pools_layout(layout: KVCacheLayout) -> None:
    """[B, H, N, C] for any layout; C is a key and a value."""
    spec = FullAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16
    )
    scratch = ScratchPages(spec, 100, torch.device("cpu"))
    scratch.lay_out(layout)
    assert scratch.pages.shape == (4, 2, 32, 128)
    assert scratch.pages.dtype == torch.bfloat16
    assert scratch.pages.untyped_storage().nbytes() == scratch.num_bytes
    scratch.pages[3, 1, 31, 127] = 1.0
    assert scratch.pages.float().sum() == 1.0
    assert scratch.block_table.tolist() == [[0, 1, 2, 3]]
    heads_outside = scratch.pages.stride(1) > scratch.pages.stride(2)
    assert heads_outside == (layout is KVCacheLayout.LBHNC)


@pytest.mark.parametrize(
    ("version", "head_size", "dtype", "tokens"),
    [
        (3, 128, torch.bfloat16, 128),
        (3, 64, torch.float16, 128),
        (3, 256, torch.bfloat16, 80),
        (3, 96, torch.bfloat16, 16),
        (3, 128, torch.uint8, 16),
        (2, 128, torch.bfloat16, 16),
        (None, 128, torch.float32, 16),
    ],
)
def test_flash_attention_3_has_pages_of_whole_tiles(
    version: int | None, head_size: int, dtype: torch.dtype, tokens: int
) -> None:
    """Its `impl` names the version; other backends have none."""
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=head_size, dtype=dtype
    )
    impl = SimpleNamespace(vllm_flash_attn_version=version)
    ours = scratch_spec(spec, impl if version else SimpleNamespace())
    assert ours == spec.copy_with_new_block_size(tokens)
    assert "self.vllm_flash_attn_version" in inspect.getsource(FlashAttentionImpl)
    # 1000 tokens in whole pages, whose bytes are as many a token as the pool's.
    scratch = ScratchPages(ours, 1000, torch.device("cpu"))
    pages = -(-1000 // tokens)
    assert scratch.num_bytes == pages * tokens * spec.page_size_bytes // 16
    assert scratch.block_table.shape == (1, pages)
