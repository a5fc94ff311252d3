"""vLLM's model as a `DecoderModel`: one layer at a time, over scratch pages.

Touch points: the decoder layers of ``model.model.layers`` and their ``Attention``
modules, `set_forward_context`, and ``impl.do_kv_cache_update`` for the writes to the
KV pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from asl_vllm.engine.settings import settings_of
from asl_vllm.engine.worker.attend_at import attend_at
from asl_vllm.engine.worker.chunks import ChunkMetadata
from asl_vllm.engine.worker.fused import FusedLayers
from asl_vllm.engine.worker.pool_rows import PoolRows
from asl_vllm.engine.worker.ranks import Ranks, among_ranks
from asl_vllm.engine.worker.scratch import ScratchPages
from asl_vllm.prefill import KeysTaken, LayerTap, ModelShape


def attention_layers(model: Any) -> list[Attention]:
    """The attention module of each decoder layer, in order."""
    return [layer.self_attn.attn for layer in model.model.layers]


def shape_of(model: Any, vllm_config: VllmConfig, device: torch.device) -> ModelShape:
    """Sizes of this rank's part of a model."""
    attentions = attention_layers(model)
    first = attentions[0]
    return ModelShape(
        num_layers=len(attentions),
        hidden_size=vllm_config.model_config.get_hidden_size(),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        value_dim=first.head_size_v,
        dtype=vllm_config.model_config.dtype,
        device=device,
    )


class VllmDecoder(Ranks):
    """Implements `asl_vllm.prefill.DecoderModel` on vLLM's layers.

    Borrows each layer's ``kv_cache`` while a pass runs and gives it back after, so
    the engine's own steps never see the scratch pages.
    """

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        shape: ModelShape,
        scratch: ScratchPages,
    ) -> None:
        self.shape = shape
        self._vllm_config = vllm_config
        self._embed = model.embed_input_ids
        self._layers = list(model.model.layers)
        self._attentions = attention_layers(model)
        self._scratch = scratch
        stock: Any = self._attentions[0].attn_backend.stock
        # A builder of our own: the runner's may own buffers of captured graphs.
        builder = stock.get_builder_cls()(
            scratch.spec,
            [attention.layer_name for attention in self._attentions],
            vllm_config,
            shape.device,
        )
        self._chunks = ChunkMetadata(
            builder, scratch, settings_of(vllm_config).chunk_tokens
        )
        self._fused = FusedLayers(self._layers)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n] -> hidden states [n, E]."""
        with among_ranks("the embedding"):
            hidden: torch.Tensor = self._embed(token_ids)
        return hidden

    @torch.inference_mode()
    def run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        tap: LayerTap,
        lengths: Sequence[int] = (),
    ) -> None:
        """See `DecoderModel.run_layer`."""
        with among_ranks(f"layer {layer}"):
            lent = self._borrowed(layer, tap)
            self._run_layer(layer, positions, hidden, start, lent, lengths)

    @torch.inference_mode()
    def run_at(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See `DecoderModel.run_at`."""
        with among_ranks(f"layer {layer}"):
            lent = self._instead(layer, positions, keys, values)
            self._run_layer(layer, positions, hidden, 0, lent)

    @torch.inference_mode()
    def load_prefix(
        self,
        layer: int,
        block_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See `DecoderModel.load_prefix`."""
        attention: Any = self._attentions[layer]
        self._pool_rows.read(attention.kv_cache[block_ids], keys, values)
        slots = self._scratch.slots[: len(keys)]
        attention.impl.do_kv_cache_update(
            attention, keys, values, self._scratch.pages, slots
        )

    @cached_property
    def _pool_rows(self) -> PoolRows:
        attention: Any = self._attentions[0]
        s, rows = self.shape, self._vllm_config.cache_config.block_size
        pool = attention.kv_cache[:1]
        page = torch.empty_strided(
            pool.size(), pool.stride(), dtype=pool.dtype, device=pool.device
        )

        def write(keys: torch.Tensor, values: torch.Tensor) -> None:
            slots = self._scratch.slots[:rows]
            attention.impl.do_kv_cache_update(attention, keys, values, page, slots)

        return PoolRows(
            page[0],
            (rows, s.num_kv_heads, s.head_dim),
            (rows, s.num_kv_heads, s.value_dim),
            s.dtype,
            write,
        )

    def _run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        lent: AbstractContextManager[None],
        lengths: Sequence[int] = (),
    ) -> None:
        name = self._attentions[layer].layer_name
        if lengths:
            metadata = self._chunks.of_several(lengths)
        else:
            metadata = self._chunks.of(start, start + len(hidden))
        with (
            self._fused.running(),
            lent,
            set_forward_context(
                {name: metadata},
                self._vllm_config,
                num_tokens=len(hidden),
                slot_mapping={name: metadata.slot_mapping},
            ),
        ):
            try:
                output, residual = self._layers[layer](positions, hidden, None)
            except KeysTaken:
                return
        torch.add(output, residual, out=hidden)

    @torch.inference_mode()
    def write_kept(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """See `DecoderModel.write_kept`."""
        attention = self._attentions[layer]
        attention.impl.do_kv_cache_update(
            attention, keys, values, attention.kv_cache, slots
        )

    def attention_scale(self, layer: int) -> float:
        """See `DecoderModel.attention_scale`."""
        attention: Any = self._attentions[layer]
        scale: float = attention.impl.scale
        # With an FP8 cache some backends take queries divided by this.
        if attention.query_quant is not None:
            scale *= attention._q_scale_float
        return scale

    @contextmanager
    def _borrowed(self, layer: int, tap: LayerTap) -> Iterator[None]:
        attention = self._attentions[layer]
        impl: Any = attention.impl
        pool = attention.kv_cache
        attention.kv_cache = self._scratch.pages
        impl.tap = tap
        try:
            yield
        finally:
            impl.tap = None
            attention.kv_cache = pool

    @contextmanager
    def _instead(
        self,
        layer: int,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> Iterator[None]:
        impl: Any = self._attentions[layer].impl

        def attend(query: torch.Tensor, output: torch.Tensor) -> None:
            n = len(positions)
            attend_at(query[:n], positions, keys, values, impl.scale, output[:n])

        impl.instead = attend
        try:
            yield
        finally:
            impl.instead = None
