"""vLLM's model as a `DecoderModel`: one layer at a time, over scratch pages.

Touch points: the decoder layers of ``model.model.layers`` and their ``Attention``
modules, `set_forward_context`, the backend's own metadata builder, and
``impl.do_kv_cache_update`` for the writes to the KV pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from asl_vllm.engine.worker.scratch import ScratchPages
from asl_vllm.prefill import KeysTaken, LayerTap, ModelShape, RankLostError


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


@contextmanager
def _among_ranks(what: str) -> Iterator[None]:
    """Around what ranks do together; one that fails in it leaves the others waiting.

    Raises:
        RankLostError: instead of an error, where there are other ranks.
    """
    try:
        yield
    except Exception as error:
        if get_tp_group().world_size == 1:
            raise
        raise RankLostError(f"{what} failed on one rank: {error!r}") from error


class VllmDecoder:
    """Implements `asl_vllm.prefill.DecoderModel` on vLLM's layers.

    Borrows each layer's ``kv_cache`` while a pass runs and gives it back after, so
    the engine's own steps never see the scratch pages.
    """

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        spec: AttentionSpec,
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
        self._builder = stock.get_builder_cls()(
            spec,
            [attention.layer_name for attention in self._attentions],
            vllm_config,
            shape.device,
        )

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n] -> hidden states [n, E]."""
        with _among_ranks("the embedding"):
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
    ) -> None:
        """See `DecoderModel.run_layer`."""
        with _among_ranks(f"layer {layer}"):
            self._run_layer(layer, positions, hidden, start, tap)

    def _run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        tap: LayerTap,
    ) -> None:
        name = self._attentions[layer].layer_name
        metadata = self._builder.build(0, self._common_metadata(start, len(hidden)))
        with (
            self._borrowed(layer, tap),
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

    def ranks_agree(self, value: int) -> bool:
        """See `DecoderModel.ranks_agree`."""
        group = get_tp_group()
        if group.world_size == 1:
            return True
        # The greatest of both signs: all ranks see the same two numbers.
        with _among_ranks("the comparison of decisions"):
            pair = torch.tensor([value, -value], device=self.shape.device)
            torch.distributed.all_reduce(
                pair, torch.distributed.ReduceOp.MAX, group=group.device_group
            )
            greatest, least = pair.tolist()
        return bool(greatest == -least)

    def sum_over_ranks(self, layer_score: torch.Tensor) -> torch.Tensor:
        """See `DecoderModel.sum_over_ranks`."""
        with _among_ranks("the sum of scores"):
            return tensor_model_parallel_all_reduce(layer_score)

    def any_rank_failed(self, failed: bool) -> bool:
        """See `DecoderModel.any_rank_failed`."""
        group = get_tp_group()
        if group.world_size == 1:
            return failed
        # Over the CPU group: it works whatever state the device is in.
        flag = torch.tensor([failed], dtype=torch.int32)
        torch.distributed.all_reduce(flag, group=group.cpu_group)
        return bool(flag.item())

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

    def _common_metadata(self, start: int, n: int) -> CommonAttentionMetadata:
        end = start + n
        query_start_loc = torch.tensor([0, n], dtype=torch.int32)
        seq_lens = torch.tensor([end], dtype=torch.int32)
        device = self.shape.device
        return CommonAttentionMetadata(
            query_start_loc=query_start_loc.to(device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=1,
            num_actual_tokens=n,
            max_query_len=n,
            max_seq_len=end,
            block_table_tensor=self._scratch.block_table,
            slot_mapping=self._scratch.slots[start:end],
        )
