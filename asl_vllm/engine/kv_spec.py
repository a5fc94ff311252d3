"""The KV-cache specs of layers whose requests may lack leading blocks, and of windows.

Touch points: ``register_kv_cache_spec`` with subclasses of `FullAttentionSpec` and
`SlidingWindowSpec`. It ties the spec, which workers give their layers, to the
scheduler's block manager.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import (
    KVCacheSpecRegistry,
    register_kv_cache_spec,
)

from asl_vllm.engine.scheduler.blocks import PrunedBlocksManager, WindowBlocksManager
from asl_vllm.engine.settings import Settings, settings_of
from asl_vllm.prefill import Bands
from asl_vllm.selection.budget import minimum_budget

# vLLM registers its own specs only while the registry is empty; an empty check
# makes it do so before ours is added.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


@register_kv_cache_spec(
    manager_class=PrunedBlocksManager, uniform_type_base_spec=FullAttentionSpec
)
@dataclass(frozen=True, kw_only=True)
class PrunedAttentionSpec(FullAttentionSpec):
    """A full-attention layer whose blocks `PrunedBlocksManager` manages.

    Layers of different ``band`` are not uniform to vLLM, so each band becomes a
    KV-cache group with a block table and a manager of its own.
    """

    band: int = 0

    @classmethod
    def merge(cls, specs: list[PrunedAttentionSpec]) -> PrunedAttentionSpec:
        assert _one_band(specs), "layers of different bands have no spec in common"
        return replace(super().merge(specs), band=specs[0].band)

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        return super().is_uniform_with_collection(kv_cache_specs) and _one_band(
            kv_cache_specs.values()
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        stock = super().max_memory_usage_bytes(vllm_config)
        settings = settings_of(vllm_config)
        if vllm_config.cache_config.num_gpu_blocks is not None or settings.has_windows:
            return stock
        # Until the pool is sized this only decides whether vLLM starts. A prompt of
        # max_model_len fits once pruned; one that is not is refused by itself
        # (engine/frontend/admission.py).
        smallest = minimum_budget(settings.config.window, self.block_size)
        blocks = cdiv(smallest, self.block_size) + 1
        return min(stock, blocks * self.page_size_bytes)


@register_kv_cache_spec(
    manager_class=WindowBlocksManager, uniform_type_base_spec=SlidingWindowSpec
)
@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A layer with a sliding window, whose blocks `WindowBlocksManager` manages."""


def _one_band(specs: Iterable[KVCacheSpec]) -> bool:
    return len({getattr(spec, "band", 0) for spec in specs}) == 1


def without_idle_windows(
    specs: Mapping[str, KVCacheSpec], settings: Settings
) -> dict[str, KVCacheSpec]:
    """The specs, where a window that leaves no token behind is none."""
    return {name: _without_idle_window(spec, settings) for name, spec in specs.items()}


def _without_idle_window(spec: KVCacheSpec, settings: Settings) -> KVCacheSpec:
    idle = isinstance(spec, WindowSpec) and not settings.window_of(spec.sliding_window)
    if not idle:
        return spec
    common = fields(AttentionSpec)
    return PrunedAttentionSpec(**{f.name: getattr(spec, f.name) for f in common})


def in_bands(
    specs: Mapping[str, KVCacheSpec], bands: Bands, layer_names: Sequence[str]
) -> dict[str, KVCacheSpec]:
    """The specs of a model's attention layers, which are named in order, in bands."""
    banded = dict(specs)
    for layer, name in enumerate(layer_names):
        spec = specs[name]
        if isinstance(spec, PrunedAttentionSpec):
            banded[name] = replace(spec, band=bands.of(layer))
        else:
            assert isinstance(spec, WindowSpec) and bands.count == 1
    return banded


def prunable(spec: AttentionSpec) -> AttentionSpec:
    """The spec as ours where it is plain full attention or a plain window."""
    if type(spec) is SlidingWindowSpec:
        return WindowSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)})
    if type(spec) is not FullAttentionSpec:
        return spec
    return PrunedAttentionSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)})
