"""The models whose layers are called, and what a layer needs around it."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)

from asl_vllm.engine.compat import SUPPORTED_ARCHITECTURES
from asl_vllm.engine.worker import ranks as ranks_module
from asl_vllm.engine.worker.ranks import Ranks
from asl_vllm.engine.worker.scratch import ScratchPages
from asl_vllm.prefill import Verdict
from tests.contract.looking import in_order, parameters, source

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


def sources(cls: type, method: str) -> str:
    """A method's source, those of the methods it extends included."""
    return "\n".join(
        source(vars(base)[method])
        for base in cls.__mro__
        if inspect.isfunction(vars(base).get(method))
    )


def test_all_supported_architectures_are_checked_here() -> None:
    assert LAYERS.keys() == SUPPORTED_ARCHITECTURES
    assert ModelRegistry.get_supported_archs() >= SUPPORTED_ARCHITECTURES


@pytest.mark.parametrize("architecture", sorted(LAYERS))
def test_decoder_layers_take_positions_states_and_residual(architecture: str) -> None:
    layer = model_class(architecture, LAYERS[architecture][1])
    names = parameters(layer.forward)  # type: ignore[attr-defined]
    assert names[:4] == ("self", "positions", "hidden_states", "residual")
    rest = list(inspect.signature(layer.forward).parameters.values())[4:]  # type: ignore[attr-defined]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in rest)
    text = source(layer.forward)  # type: ignore[attr-defined]
    # Without a residual the input is the residual: hidden + residual is the output.
    assert in_order(text, "if residual is None:", "residual = hidden_states")
    assert "return (hidden_states, residual)" in text


@pytest.mark.parametrize("architecture", sorted(LAYERS))
def test_a_layers_attention_module_is_self_attn_attn(architecture: str) -> None:
    _, layer, module = LAYERS[architecture]
    assert "self.self_attn = " in sources(model_class(architecture, layer), "__init__")
    text = sources(model_class(architecture, module), "__init__")
    assert "self.attn = " in text


@pytest.mark.parametrize("architecture", sorted(LAYERS))
def test_models_embed_and_hold_their_layers(architecture: str) -> None:
    model = model_class(architecture, architecture)
    assert parameters(model.embed_input_ids) == ("self", "input_ids")  # type: ignore[attr-defined]
    assert "self.model.embed_input_ids(input_ids)" in source(model.embed_input_ids)  # type: ignore[attr-defined]
    assert "self.model = " in sources(model, "__init__")


def test_set_forward_context() -> None:
    names = parameters(set_forward_context)
    assert names[:3] == ("attn_metadata", "vllm_config", "num_tokens")
    assert "slot_mapping" in names


def test_a_forward_context_of_a_moe_model_waits_for_other_ranks() -> None:
    """Why expert parallelism across data-parallel ranks is refused."""
    assert in_order(
        source(set_forward_context),
        "is_moe_model is not False",
        "coordinate_batch_across_dp(",
    )


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


def test_all_reduce_takes_a_tensor() -> None:
    assert parameters(tensor_model_parallel_all_reduce) == ("input_",)


def test_the_tensor_parallel_group() -> None:
    assert parameters(get_tp_group) == ()
    text = source(GroupCoordinator.__init__)
    assert "self.cpu_group = " in text
    assert "self.world_size = " in text


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
    scratch.lay_out(layout, 32)
    assert scratch.pages.shape == (4, 2, 32, 128)
    assert scratch.pages.dtype == torch.bfloat16
    assert scratch.pages.untyped_storage().nbytes() == scratch.num_bytes
    scratch.pages[3, 1, 31, 127] = 1.0
    assert scratch.pages.float().sum() == 1.0
    assert scratch.block_table.tolist() == [[0, 1, 2, 3]]
    heads_outside = scratch.pages.stride(1) > scratch.pages.stride(2)
    assert heads_outside == (layout is KVCacheLayout.LBHNC)
