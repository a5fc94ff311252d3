"""vLLM's model as a `DecoderModel`: one layer at a time, over scratch pages.

Touch points: the layers' ``Attention`` modules, `set_forward_context`, and
``impl.do_kv_cache_update`` for the writes to the KV pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from asl_vllm.engine.settings import settings_of
from asl_vllm.engine.worker.attend_at import attend_at
from asl_vllm.engine.worker.chunks import ChunkMetadata
from asl_vllm.engine.worker.fused import FusedLayers
from asl_vllm.engine.worker.pool_rows import PoolRows
from asl_vllm.engine.worker.ranks import Ranks, among_ranks
from asl_vllm.engine.worker.scratch import ScratchPages
from asl_vllm.engine.worker.stages.find import attention_layers, list_of_layers
from asl_vllm.engine.worker.stages.positions import of_text, position_dimensions
from asl_vllm.engine.worker.stages.proof import Proof
from asl_vllm.prefill import KeysTaken, Known, LayerTap, ModelShape


def shape_of(model: Any, vllm_config: VllmConfig, device: torch.device) -> ModelShape:
    """Sizes of this rank's part of a model."""
    attentions = attention_layers(model)
    first = attentions[0]
    window_of = settings_of(vllm_config).window_of
    windows = tuple(window_of(attention.sliding_window) for attention in attentions)
    return ModelShape(
        num_layers=len(attentions),
        hidden_size=vllm_config.model_config.get_hidden_size(),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        value_dim=first.head_size_v,
        dtype=vllm_config.model_config.dtype,
        device=device,
        windows=windows if any(windows) else (),
    )


class VllmDecoder(Ranks):
    """Implements `asl_vllm.prefill.DecoderModel` on vLLM's layers.

    Borrows each layer's ``kv_cache`` while a pass runs and gives it back after, so
    the engine's own steps never see the scratch pages. Making one runs a short prompt
    (`Proof`), so all tensor-parallel ranks must make theirs.

    Raises:
        UnsupportedError: the model's layers, one by one, do not do what it does.
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
        self._attentions = attention_layers(model)
        self._scratch = scratch
        windows = shape.windows or (None,) * shape.num_layers
        # A builder may plan for its layers' window.
        made = {window: self._metadata(windows, window) for window in set(windows)}
        self._chunks = [made[window] for window in windows]
        self._fused = FusedLayers(list_of_layers(model)[2])
        self._dimensions = position_dimensions(vllm_config.model_config)
        with among_ranks("the check of the model's layers"):
            self.found = Proof(
                model,
                self._attentions,
                self._around,
                self.greatest,
                tokens=min(settings_of(vllm_config).chunk_tokens, len(scratch.slots)),
                dtype=shape.dtype,
                vocabulary=vllm_config.model_config.get_vocab_size(),
                dimensions=self._dimensions,
                device=shape.device,
            ).find()
        self._stages = self.found.stages

    def _metadata(
        self, windows: Sequence[int | None], window: int | None
    ) -> ChunkMetadata:
        """Of the layers with this window."""
        mine = [
            a for a, w in zip(self._attentions, windows, strict=True) if w == window
        ]
        scratch, vllm_config = self._scratch, self._vllm_config
        spec = scratch.spec
        if window is not None:
            own = mine[0].get_kv_cache_spec(vllm_config)
            spec = own.copy_with_new_block_size(spec.block_size)
        stock: Any = mine[0].attn_backend.stock
        # A builder of our own: the runner's may own buffers of captured graphs.
        builder = stock.get_builder_cls()(
            spec, [a.layer_name for a in mine], vllm_config, self.shape.device
        )
        return ChunkMetadata(builder, scratch, settings_of(vllm_config).chunk_tokens)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `DecoderModel.embed`."""
        with among_ranks("the embedding"):
            return self._embed(token_ids, positions)

    def _embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with self._around(0, len(token_ids), ()):
            return self._stages.embed(token_ids, of_text(positions, self._dimensions))

    @torch.inference_mode()
    def run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        tap: LayerTap,
        lengths: Sequence[int] = (),
        loaded: Sequence[int] = (),
    ) -> None:
        """See `DecoderModel.run_layer`."""
        with among_ranks(f"layer {layer}"):
            lent = self._tapped(layer, tap)
            self._run_layer(layer, positions, hidden, start, lent, lengths, loaded)

    @torch.inference_mode()
    def run_at(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        known: Sequence[Known],
        lengths: Sequence[int],
    ) -> None:
        """See `DecoderModel.run_at`."""
        with among_ranks(f"layer {layer}"):
            lent = self._instead(layer, positions, known, lengths)
            self._run_layer(layer, positions, hidden, 0, lent)

    @torch.inference_mode()
    def load_prefixes(
        self,
        layer: int,
        block_ids: torch.Tensor,
        into: Sequence[Known],
        lengths: Sequence[int] = (),
    ) -> None:
        """See `DecoderModel.load_prefixes`."""
        with among_ranks("a cached prefix"):
            attention: Any = self._attentions[layer]
            pool, pages = attention.kv_cache, self._scratch.pages[: len(block_ids)]
            if len(into) == 1 and pages.shape[1:] == pool.shape[1:]:
                # One prompt's whole blocks lie there as in the pool.
                torch.index_select(pool, 0, block_ids, out=pages)
                self._pool_rows.rows_of(pages, into[0].keys, into[0].values)
                return
            keys, values = self._pool_rows.rows_of(pool[block_ids])
            rows = [len(own.keys) for own in into]
            parts = zip(into, keys.split(rows), values.split(rows), strict=True)
            for own, key, value in parts:
                own.keys.copy_(key)
                own.values.copy_(value)
            slots = self._chunks[layer].slots_before(rows, lengths or [0] * len(rows))
            attention.impl.do_kv_cache_update(
                attention, keys, values, self._scratch.pages, slots
            )

    @cached_property
    def _pool_rows(self) -> PoolRows:
        attention: Any = self._attentions[0]
        s, rows = self.shape, settings_of(self._vllm_config).block_size
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
        loaded: Sequence[int] = (),
    ) -> None:
        end = start + len(hidden)
        with self._around(start, end, (layer,), lengths, loaded), lent:
            try:
                self._stages.run(layer, of_text(positions, self._dimensions), hidden)
            except KeysTaken:
                return

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
    def _around(
        self,
        start: int,
        end: int,
        layers: Sequence[int],
        lengths: Sequence[int] = (),
        loaded: Sequence[int] = (),
    ) -> Iterator[None]:
        """What calls of these layers on rows ``[start, end)`` need around them.

        With ``lengths`` the rows are so many of each prompt, one by one, behind
        ``loaded`` ones.
        """
        attentions = [self._attentions[layer] for layer in layers]
        pools = [attention.kv_cache for attention in attentions]
        metadata, slots = {}, {}
        for layer, attention in zip(layers, attentions, strict=True):
            chunks = self._chunks[layer]
            if lengths:
                own = chunks.of_several(lengths, loaded)
            else:
                own = chunks.of(start, end)
            metadata[attention.layer_name] = own
            slots[attention.layer_name] = own.slot_mapping
        with (
            self._fused.running(),
            set_forward_context(
                metadata,
                self._vllm_config,
                num_tokens=end - start,
                slot_mapping=slots,
                # A range of layers is not what was compiled.
                skip_compiled=True,
            ),
        ):
            try:
                for attention in attentions:
                    attention.kv_cache = self._scratch.pages
                yield
            finally:
                for attention, pool in zip(attentions, pools, strict=True):
                    attention.kv_cache = pool

    @contextmanager
    def _tapped(self, layer: int, tap: LayerTap) -> Iterator[None]:
        impl: Any = self._attentions[layer].impl
        impl.tap = tap
        try:
            yield
        finally:
            impl.tap = None

    @contextmanager
    def _instead(
        self,
        layer: int,
        positions: torch.Tensor,
        known: Sequence[Known],
        lengths: Sequence[int],
    ) -> Iterator[None]:
        impl: Any = self._attentions[layer].impl

        def attend(query: torch.Tensor, output: torch.Tensor) -> None:
            n = len(positions)
            attend_at(query[:n], positions, known, lengths, impl.scale, output[:n])

        impl.instead = attend
        try:
            yield
        finally:
            impl.instead = None
