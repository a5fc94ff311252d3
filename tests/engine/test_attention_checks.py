"""Attention that a loaded model may have and passes cannot run or score."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.kv_spec import prunable
from asl_vllm.engine.worker.checks import (
    check_attention,
    check_windows,
    one_spec,
)

PLAIN: dict[str, Any] = {
    "query_quant": None,
    "_q_scale": torch.ones(1),
    "kv_sharing_target_layer_name": None,
}
PLAIN_IMPL: dict[str, Any] = {
    "alibi_slopes": None,
    "logits_soft_cap": 0,
    "sinks": None,
}
SIZES: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 32,
    "dtype": torch.float32,
}


def layer(
    name: str = "layers.0", impl: dict[str, Any] | None = None, **own: Any
) -> Any:
    made = SimpleNamespace(**{**PLAIN_IMPL, **(impl or {})})
    return SimpleNamespace(layer_name=name, impl=made, **{**PLAIN, **own})


def test_plain_attention_passes() -> None:
    check_attention([layer(), layer(odd={"logits_soft_cap": None})])
    # Scales of queries that are not divided by them.
    check_attention([layer(_q_scale=torch.ones(2))])
    check_attention([layer(query_quant=object())])


@pytest.mark.parametrize(
    ("odd", "needed", "got", "remedy"),
    [
        (
            layer("layers.1", query_quant=object(), _q_scale=torch.ones(2)),
            "FP8 queries with one scale a layer",
            "2 scales in layers.1",
            "use a checkpoint with per-tensor scales",
        ),
        (
            layer("layers.1", kv_sharing_target_layer_name="layers.0"),
            "a KV cache of each layer's own",
            "the cache of layers.0 in layers.1",
            "choose another model",
        ),
        (
            layer("layers.1", {"alibi_slopes": [0.5]}),
            "positions that are part of keys",
            "ALiBi in layers.1",
            "choose another model",
        ),
        (
            layer("layers.1", {"logits_soft_cap": 50.0}),
            "attention scores as they are",
            "a soft cap of 50.0 in layers.1",
            "choose another model",
        ),
        (
            layer("layers.1", {"sinks": torch.zeros(2)}),
            "attention to tokens only",
            "attention sinks in layers.1",
            "choose another model",
        ),
    ],
    ids=["scales", "shared", "alibi", "soft cap", "sinks"],
)
def test_the_first_odd_layer_is_named(
    odd: Any, needed: str, got: str, remedy: str
) -> None:
    with pytest.raises(UnsupportedError) as refused:
        check_attention([layer(), odd])
    for part in (f"needs {needed}", f"got {got}.", f"Remedy: {remedy}"):
        assert part in str(refused.value)


def test_windows_are_those_that_the_configuration_lists() -> None:
    check_windows((), (0, 1))
    check_windows((8, None), (1,))
    for windows, got in (((8, 4, None), r"\[4, 8\]"), ((None, 8), r"\[None, 8\]")):
        with pytest.raises(UnsupportedError, match=f"got .*{got}"):
            check_windows(windows, (1,))


def test_layers_of_one_spec() -> None:
    full = prunable(FullAttentionSpec(**SIZES))
    assert one_spec({"a": full, "b": full}) is full
    window = SlidingWindowSpec(**SIZES, sliding_window=8)
    other = prunable(FullAttentionSpec(**{**SIZES, "head_size": 64}))
    for odd, got in ((window, "SlidingWindowSpec"), (other, "2 shapes")):
        with pytest.raises(UnsupportedError, match=f"got layers of {got}"):
            one_spec({"a": full, "b": odd})
    # A layer with a window may differ by that only.
    assert one_spec({"a": full, "b": prunable(window)}) is full
    wide = SlidingWindowSpec(**{**SIZES, "head_size": 64}, sliding_window=8)
    with pytest.raises(UnsupportedError, match="whose KV heads are those of the"):
        one_spec({"a": full, "b": prunable(wide)})
