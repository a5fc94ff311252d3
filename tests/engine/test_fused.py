"""Eagerly called layers use one kernel for a norm, a rotation and an activation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import vllm._custom_ops  # noqa: F401  # loads the kernels that the test counts
from torch import nn
from vllm import ir
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from asl_vllm.engine.worker import fused
from asl_vllm.engine.worker.fused import FusedLayers
from asl_vllm_testing.launches import Launches

TOKENS, HIDDEN, HEADS, HEAD_DIM = 5, 64, 4, 16
NORMS = ("rms_norm", "fused_add_rms_norm")


class Layer(nn.Module):
    """What a decoder layer does beside its matrix products and its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.before = RMSNorm(HIDDEN)
        self.after = RMSNorm(HIDDEN)
        self.rotary = RotaryEmbedding(
            HEAD_DIM, HEAD_DIM, 128, 10000.0, True, torch.float32
        )
        self.act = SiluAndMul()
        # vLLM gives it one on GPUs only; the CPU build has the kernel too.
        self.act.op = torch.ops._C.silu_and_mul

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        residual = hidden
        normed = self.before(hidden)
        query, key = self.rotary(positions, normed.clone(), normed.clone())
        normed, residual = self.after(query + key, residual)
        gated: torch.Tensor = self.act(torch.cat([normed, residual], dim=-1))
        return gated


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layer]:
    """A layer as it is in a model that vLLM compiles for a GPU."""
    config = VllmConfig(
        compilation_config=CompilationConfig(custom_ops=["none"], backend="eager")
    )
    monkeypatch.setattr(fused.current_platform, "is_cuda", lambda: True)
    for name in NORMS:
        operation = getattr(ir.ops, name)
        monkeypatch.setattr(operation.impls["vllm_c"], "supported", True)
        monkeypatch.setattr(
            operation, "_priority_impls", operation._filter_priority_impls(["native"])
        )
    with set_current_vllm_config(config):
        layer = Layer()
    for op in (layer.before, layer.rotary, layer.act):
        assert op._forward_method != op.forward_cuda
    # What vLLM would compile by itself, not compiled: it takes a compiler a while.
    layer.act._forward_method = layer.act.forward_native
    yield layer


def count(layer: Layer) -> tuple[torch.Tensor, list[str]]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN)
    with torch.inference_mode(), Launches() as launches:
        output = layer(torch.arange(TOKENS), hidden)
    return output, launches.names


def test_each_operation_is_one_kernel_inside_a_pass(compiled: Layer) -> None:
    layers = FusedLayers([compiled])
    wanted, before = count(compiled)
    with layers.running():
        output, inside = count(compiled)
    after = count(compiled)[1]
    torch.testing.assert_close(output, wanted)
    kernels = [name for name in inside if name.startswith("_C::")]
    assert kernels == [
        "_C::rms_norm",
        "_C::rotary_embedding",
        "_C::fused_add_rms_norm",
        "_C::silu_and_mul",
    ]
    # The rest is the test's own: positions, copies, a sum, a join.
    assert len(inside) == 9
    assert len(before) > 20
    assert after == before


def test_an_error_leaves_all_as_it_was(compiled: Layer) -> None:
    layers = FusedLayers([compiled])
    _, before = count(compiled)
    with pytest.raises(ZeroDivisionError), layers.running():
        raise ZeroDivisionError
    assert count(compiled)[1] == before


def test_elsewhere_nothing_is_changed(
    compiled: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused.current_platform, "is_cuda", lambda: False)
    layers = FusedLayers([compiled])
    _, before = count(compiled)
    with layers.running():
        # Only the wrapping for a compiler is left out.
        assert [n for n in count(compiled)[1] if n.startswith("_C::")] == []
    assert count(compiled)[1] == before
