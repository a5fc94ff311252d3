"""Where a model keeps its decoder layers and their attention.

Touch points: ``start_layer`` and ``end_layer`` of models that can be pipeline stages,
the module list of vLLM's Transformers backend, `Attention` and `AttentionLayerBase`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from asl_vllm.engine.compat import UnsupportedError

_TRANSFORMERS = "vllm.model_executor.models.transformers"


def runs_on_transformers(model: nn.Module) -> bool:
    """Whether vLLM runs the model with Transformers' code."""
    return any(c.__module__.startswith(_TRANSFORMERS) for c in type(model).__mro__)


def stage_owners(model: nn.Module) -> list[Any]:
    """Modules whose ``start_layer`` and ``end_layer`` say which layers run."""
    owners = [
        module
        for module in model.modules()
        if isinstance(vars(module).get("start_layer"), int)
        and isinstance(vars(module).get("end_layer"), int)
    ]
    # Others have the range of another stack of layers, as of an encoder.
    return [o for o in owners if o.end_layer == owners[0].end_layer]


def list_of_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that owns the decoder layers, their name in it, and the list.

    Raises:
        UnsupportedError: there is none.
    """
    if runs_on_transformers(model):
        count = model.text_config.num_hidden_layers
        inner = model.model
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
        owners = list(decoder.modules())
    else:
        owners = stage_owners(model)
        count = owners[0].end_layer if owners else 0
    for owner in owners:
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count > 0:
                return owner, name, child
    raise UnsupportedError(
        "a model whose layers can be called one at a time, by pipeline parallelism or "
        "vLLM's Transformers backend",
        f"{type(model).__name__}, which has no list of layers with a range",
        "pass --model-impl transformers, if Transformers has the model",
    )


def attention_layers(model: nn.Module) -> list[Attention]:
    """The attention module of each decoder layer, in order.

    Raises:
        UnsupportedError: a layer without one, with several, or with another kind.
    """
    found = []
    for index, layer in enumerate(list_of_layers(model)[2]):
        # Not by its name: architectures name it in many ways.
        modules = [m for m in layer.modules() if isinstance(m, AttentionLayerBase)]
        if len(modules) != 1 or not isinstance(modules[0], Attention):
            kinds = ", ".join(type(m).__name__ for m in modules) or "none"
            raise UnsupportedError(
                "one attention module in every layer",
                f"layer {index} with {kinds}",
                "choose another model",
            )
        found.append(modules[0])
    return found
