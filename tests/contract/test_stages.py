"""Single layers of vLLM's models: each way to call them, and the check at start-up."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
    parallel_state,
)
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import registry
from vllm.utils.network_utils import get_open_port
from vllm.v1.kv_cache_interface import KVCacheLayout

from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.worker import attention, fused
from asl_vllm.engine.worker.decoder import VllmDecoder, shape_of
from asl_vllm.engine.worker.fused import FusedLayers
from asl_vllm.engine.worker.scratch import ScratchPages
from asl_vllm.engine.worker.stages import proof
from asl_vllm.engine.worker.stages.find import attention_layers, list_of_layers
from asl_vllm.engine.worker.stages.pipeline import DirectStages, PipelineStages
from asl_vllm.prefill import LayerTap, PrefillBuffers
from asl_vllm_testing.architectures import ARCHITECTURES, DIRECT, HIDDEN, LIST, SUM
from asl_vllm_testing.drawn_weights import random_weights
from asl_vllm_testing.launches import Launches
from asl_vllm_testing.vllm_configs import engine_config

WAYS = {
    DIRECT: "LlamaForCausalLM",
    SUM: "LlamaForCausalLM",
    HIDDEN: "GPT2LMHeadModel",
    LIST: "Olmo2ForCausalLM",
}
SEVERAL = "PaddleOCRVLForConditionalGeneration"
"""Each of its positions is three numbers."""
TOKENS = 60


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    attention.install()
    # vLLM's CPU worker does so too.
    torch.accelerator.empty_cache, stock = lambda: None, torch.accelerator.empty_cache
    with set_current_vllm_config(VllmConfig()):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        init_distributed_environment(1, 0, address, 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    torch.accelerator.empty_cache = stock
    cleanup_dist_env_and_memory()
    attention.uninstall()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Models that were loaded, and their configurations, by architecture."""
    made = {}
    # Looked at in this process, which takes no seconds.
    looked = pytest.MonkeyPatch()
    looked.setattr(registry, "_run_in_subprocess", lambda function: function())
    by_name = {a.name: a for a in ARCHITECTURES}
    for name in sorted({*WAYS.values(), SEVERAL}):
        config = engine_config(
            {"policy": "asl", "window": 16, "l_min": 1, "l_obs": 2},
            model=by_name[name].write(tmp_path_factory.mktemp("models") / name),
            load_format="dummy",
            block_size=32,
            **by_name[name].options,
        )
        with set_current_vllm_config(config), random_weights():
            made[name] = get_model(vllm_config=config), config
    looked.undo()
    return made


def only(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The way that the check tries."""
    if way == DIRECT:
        monkeypatch.setattr(proof, "_ways", lambda m: [lambda: DirectStages(m)])
    elif way in (SUM, HIDDEN):
        monkeypatch.setattr(
            proof,
            "_ways",
            lambda m: [lambda: PipelineStages(m, adds_residual=way == SUM)],
        )


def decoder_of(model: Any, vllm_config: Any) -> VllmDecoder:
    device = torch.device("cpu")
    with set_current_vllm_config(vllm_config):
        spec: Any = attention_layers(model)[0].get_kv_cache_spec(vllm_config)
        scratch = ScratchPages(spec, 128, device)
        scratch.lay_out(KVCacheLayout.LBHNC)
        shape = shape_of(model, vllm_config, device)
        return VllmDecoder(model, vllm_config, shape, scratch)


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    """Attributes and children of all modules and of attention's implementations."""
    own = [{**vars(m), "children": dict(m._modules)} for m in model.modules()]
    impls: list[Any] = [a.impl for a in attention_layers(model)]
    return [*own, *(dict(vars(impl)) for impl in impls)]


class Tap(LayerTap):
    """Sees what a layer's attention is given, and may fail there."""

    keys_only = False

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def on_query(self, query: torch.Tensor) -> None:
        if self.error is not None:
            raise self.error

    def on_kv(self, key: torch.Tensor, value: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_exact_and_leaves_vllm_as_it_was(
    way: str, loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """After passes and after errors in the middle of one."""
    model, config = loaded[WAYS[way]]
    only(monkeypatch, way)
    decoder_of(model, config)  # What vLLM notes at its first call is there.
    before, group = state_of(model), parallel_state._PP
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        decoder = decoder_of(model, config)
    assert f"by {way}, do what its forward does" in caplog.text
    assert re.search(r"; checked in \d+\.\d\d s$", caplog.text, re.M)
    assert decoder.found.stages.name == way
    assert decoder.found.off == 0
    positions = torch.arange(TOKENS)
    hidden = decoder.embed(positions + 3, positions)
    for error in (None, ValueError("injected")):
        failing = pytest.raises(ValueError, match="injected")
        with failing if error else contextlib.nullcontext():
            decoder.run_layer(1, positions, hidden, 0, Tap(error))
        assert state_of(model) == before
        assert parallel_state._PP is group


@torch.inference_mode()
def test_positions_are_as_vllm_gives_them(loaded: Any) -> None:
    """Also those that a prompt's selected tokens have."""
    model, config = loaded[SEVERAL]
    decoder = decoder_of(model, config)
    wanted, delta = model.get_mrope_input_positions([5] * TOKENS, [])
    assert (wanted.shape, delta) == ((3, TOKENS), 0)
    seen: list[torch.Tensor] = []
    layer = list_of_layers(model)[2][1]
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    selected = torch.tensor([0, 7, TOKENS - 1])
    for positions in (torch.arange(TOKENS), selected):
        hidden = decoder.embed(positions + 3, positions)
        decoder.run_layer(1, positions, hidden, 0, Tap())
    hook.remove()
    assert torch.equal(seen[0], wanted)
    assert torch.equal(seen[1], wanted[:, selected])


class Operations(TorchDispatchMode):
    """Counts tensor operations, each a kernel launch on a GPU or a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **kw or {})


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_a_pass_costs_its_layer_and_rebuilds_nothing(
    way: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counts of operations and of modules that are made."""
    model, config = loaded[WAYS[way]]
    only(monkeypatch, way)
    decoder = decoder_of(model, config)
    stages, layers = decoder.found.stages, list_of_layers(model)[2]
    positions = torch.arange(TOKENS)
    hidden = decoder.embed(positions + 3, positions)
    inside: list[int] = []

    def counted(forward: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            with Operations() as of_layer:
                output = forward(*args, **kwargs)
            inside.append(of_layer.count)
            return output

        return count

    monkeypatch.setattr(layers[1], "forward", counted(layers[1].forward))
    made: list[nn.Module] = []
    init = nn.Module.__init__
    monkeypatch.setattr(
        nn.Module, "__init__", lambda self, *a, **k: made.append(self) or init(self)
    )
    with decoder._around(0, TOKENS, [1]), Operations() as outside:
        stages.run(1, positions, hidden)
    assert len(inside) == 1
    if way != LIST:
        assert made == []
        # The sum, or a copy.
        assert outside.count - inside[0] == 1
        return
    # A slice of the list of layers, which Transformers takes in each forward.
    assert [type(module) for module in made] == [nn.ModuleList]
    # Transformers' own forward makes positions and rotary tables around the layers.
    assert outside.count - inside[0] <= 40


@torch.inference_mode()
def test_a_pass_launches_few_kernels(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that vLLM compiles, on a platform that is told to be a GPU's."""
    model, config = loaded["LlamaForCausalLM"]
    monkeypatch.setattr(fused.current_platform, "is_cuda", lambda: True)
    for name in ("rms_norm", "fused_add_rms_norm"):
        operation = getattr(ir.ops, name)
        monkeypatch.setattr(operation.impls["vllm_c"], "supported", True)
        monkeypatch.setattr(
            operation, "_priority_impls", operation._filter_priority_impls(["native"])
        )
    for module in model.modules():
        if isinstance(module, CustomOp):
            monkeypatch.setattr(module, "_forward_method", module.forward_native)
        if isinstance(module, SiluAndMul):
            # vLLM gives it one on GPUs only; the CPU build has the kernel too.
            monkeypatch.setattr(module, "op", torch.ops._C.silu_and_mul, raising=False)
    for attention_layer in attention_layers(model):
        # What is inside an opaque operation would be counted as one.
        monkeypatch.setattr(attention_layer, "use_direct_call", True)
    decoder = decoder_of(model, config)
    tap = LayerTap(PrefillBuffers(decoder.shape, 128, 16))
    tap.start_layer(TOKENS)
    tap.start_chunk(0, TOKENS)
    positions = torch.arange(TOKENS)
    hidden = decoder.embed(positions + 3, positions)
    decoder.run_layer(1, positions, hidden, 0, tap)  # metadata is made once
    with Launches() as inside:
        decoder.run_layer(1, positions, hidden, 0, tap)
    monkeypatch.setattr(fused.current_platform, "is_cuda", lambda: False)
    monkeypatch.setattr(decoder, "_fused", FusedLayers([]))
    with Launches() as unfused:
        decoder.run_layer(1, positions, hidden, 0, tap)
    assert len(inside.names) <= 20 < len(unfused.names)


def test_the_layer_and_the_tensor_that_differ_are_named(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states alone are not what Llama's layers hand on."""
    model, config = loaded["LlamaForCausalLM"]
    decoder_of(model, config)
    before = state_of(model)
    only(monkeypatch, HIDDEN)
    with pytest.raises(UnsupportedError) as refused:
        decoder_of(model, config)
    for part in (
        "a model whose layers, called one by one, do what its forward does",
        f"LlamaForCausalLM, where they do not: by {HIDDEN}, queries of layer 1 differ",
        "Remedy: choose another model",
    ):
        assert part in str(refused.value)
    assert state_of(model) == before


def test_a_way_that_does_not_fit_is_told(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = loaded["GPT2LMHeadModel"]
    only(monkeypatch, SUM)
    with pytest.raises(UnsupportedError, match="a layer hands on no residual"):
        decoder_of(model, config)


def test_what_has_no_layers_or_no_attention_is_refused(loaded: Any) -> None:
    with pytest.raises(UnsupportedError, match="got Linear, which has no list"):
        attention_layers(nn.Linear(1, 1))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(1, 1)])
    model.__dict__.update(start_layer=0, end_layer=1)
    with pytest.raises(UnsupportedError, match="got layer 0 with none"):
        attention_layers(model)
    ours = attention_layers(loaded["LlamaForCausalLM"][0])
    model.layers = nn.ModuleList([nn.ModuleList([ours[0], ours[1]])])
    with pytest.raises(UnsupportedError, match=r"layer 0 with \w+, \w+"):
        attention_layers(model)
