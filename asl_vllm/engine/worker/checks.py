"""Attention that passes cannot run or score, refused when the model is loaded.

Touch points: what `Attention` and its implementation say of themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.kv_spec import PrunedAttentionSpec, WindowSpec
from asl_vllm.engine.worker import attention

_OTHER_MODEL = "choose another model"


def check_attention(attentions: Iterable[Any]) -> None:
    """Looks at each layer's attention module.

    Raises:
        UnsupportedError: for the first that is not plain.
    """
    for layer in attentions:
        for needed, got, remedy in _obstacles(layer):
            raise UnsupportedError(needed, f"{got} in {layer.layer_name}", remedy)


def _obstacles(layer: Any) -> Iterator[tuple[str, str, str]]:
    impl = layer.impl
    if layer.query_quant is not None and layer._q_scale.numel() > 1:
        yield (
            "FP8 queries with one scale a layer",
            f"{layer._q_scale.numel()} scales",
            "use a checkpoint with per-tensor scales, or --kv-cache-dtype auto",
        )
    if layer.kv_sharing_target_layer_name is not None:
        yield (
            "a KV cache of each layer's own",
            f"the cache of {layer.kv_sharing_target_layer_name}",
            _OTHER_MODEL,
        )
    if getattr(impl, "alibi_slopes", None) is not None:
        # It counts rows, and rows that are kept lie closer than their tokens.
        yield (
            "positions that are part of keys (rotary) or of embeddings",
            "ALiBi",
            _OTHER_MODEL,
        )
    if getattr(impl, "logits_soft_cap", None):
        yield (
            "attention scores as they are",
            f"a soft cap of {impl.logits_soft_cap}",
            _OTHER_MODEL,
        )
    if getattr(impl, "sinks", None) is not None:
        yield ("attention to tokens only", "attention sinks", _OTHER_MODEL)


def check_windows(windows: Sequence[int | None], scored: Sequence[int]) -> None:
    """Compares the layers' sliding windows with those that the configuration lists.

    ``windows`` is empty where no layer has one; ``scored`` are those without.

    Raises:
        UnsupportedError: they differ, or windows are of several sizes.
    """
    sizes = sorted({window for window in windows if window})
    if len(sizes) > 1:
        raise UnsupportedError("sliding windows of one size", f"{sizes}", _OTHER_MODEL)
    if windows and [i for i, w in enumerate(windows) if w is None] != list(scored):
        raise UnsupportedError(
            "a config.json whose layer_types say which layers have a sliding window",
            f"windows {list(windows)}",
            _OTHER_MODEL,
        )


def one_spec(specs: Mapping[str, KVCacheSpec]) -> AttentionSpec:
    """The spec that all layers without a sliding window share.

    Raises:
        UnsupportedError: layers differ, but for the window.
    """
    windows = {spec for spec in specs.values() if isinstance(spec, WindowSpec)}
    distinct = set(specs.values()) - windows
    if len(distinct) == 1 and {_page(s) for s in windows} - {_page(*distinct)}:
        raise UnsupportedError(
            "layers with a sliding window whose KV heads are those of the others",
            f"{sorted({_page(spec) for spec in windows | distinct}, key=str)}",
            _OTHER_MODEL,
        )
    odd = sorted(
        {type(spec).__name__ for spec in distinct} - {PrunedAttentionSpec.__name__}
    )
    if odd or len(distinct) != 1:
        raise UnsupportedError(
            "every layer being full attention of one shape on a backend of "
            f"{', '.join(attention.WRAPPED_BACKENDS)}",
            f"layers of {', '.join(odd) or f'{len(distinct)} shapes'}",
            "pass --attention-backend with one of these, or --kv-policy none",
        )
    (spec,) = distinct
    assert isinstance(spec, AttentionSpec)
    return spec


def _page(spec: KVCacheSpec) -> tuple[object, ...]:
    """What blocks of a layer are made of."""
    assert isinstance(spec, AttentionSpec)
    heads = spec.num_kv_heads, spec.head_size, spec.head_size_v
    return spec.block_size, *heads, spec.dtype, spec.page_size_padded
