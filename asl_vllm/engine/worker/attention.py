"""vLLM's attention backends, able to skip leading null blocks and to be tapped.

Touch points: ``register_backend`` overrides a backend's enum entry with a subclass
of that very backend. `customize_spec` gives its layers a `PrunedAttentionSpec`; the
metadata builder turns leading null blocks into a shifted block table and shorter
sequence lengths; the implementation hands keys, values and queries to a `LayerTap`
while a pruned prefill runs. Everything else is the backend's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from asl_kernels.block_table_view import block_table_view
from asl_vllm.engine.kv_spec import WindowSpec, prunable
from asl_vllm.prefill import KeysTaken, LayerTap

WRAPPED_BACKENDS: dict[str, str] = {
    "CPU_ATTN": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend",
    "FLASH_ATTN": "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend",
    "TRITON_ATTN": "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
}
"""Backends that can serve pruned requests, by their `AttentionBackendEnum` name."""


class TapMixin:
    """Attention implementation that shows a chunk's q, k, v to ``tap`` when set.

    ``instead``, when set, is called with queries and output in place of the backend's
    attention, and nothing is written to the cache. Where the tap's rows have gaps, it
    does what a sliding window sees of them.
    """

    tap: LayerTap | None = None
    instead: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
    ) -> None:
        if self.instead is not None:
            return
        if self.tap is not None:
            self.tap.on_kv(key, value)
        super().do_kv_cache_update(layer, key, value, *args, **kw)  # type: ignore[misc]

    def forward(self, layer: Any, query: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if self.instead is not None:
            output = kw["output"] if "output" in kw else args[4]
            self.instead(query, output)
            return output
        if self.tap is not None:
            self.tap.on_query(query)
            if self.tap.keys_only:
                raise KeysTaken
            if self.tap.has_gaps:
                output = kw["output"] if "output" in kw else args[4]
                scale: float = self.scale  # type: ignore[attr-defined]
                self.tap.attend_window(query, output, layer.sliding_window, scale)
                return output
        return super().forward(layer, query, *args, **kw)  # type: ignore[misc]


class ViewMixin:
    """Metadata builder that shows attention a table without leading null blocks.

    Owns the persistent buffers of the shifted tables, which captured CUDA graphs
    may refer to.
    """

    supports_update_block_table = False
    kv_cache_spec: AttentionSpec
    vllm_config: VllmConfig
    _tables: torch.Tensor | None = None
    _lengths: torch.Tensor | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        return super().build(  # type: ignore[misc]
            common_prefix_len, self._view(common_attn_metadata), fast_build
        )

    def _view(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        if isinstance(self.kv_cache_spec, WindowSpec):
            # Backends skip what a window has left behind by themselves.
            return common
        table = common.block_table_tensor
        # On the CPU a look is free and spares batches without pruned requests the
        # copy; on a GPU it would cost a host sync.
        if table.device.type == "cpu" and not bool((table[:, :1] == 0).any()):
            return common
        if self._tables is None or self._lengths is None:
            self._allocate(table, common.seq_lens)
        assert self._tables is not None and self._lengths is not None
        rows = table.shape[0]
        assert rows <= self._tables.shape[0]
        assert table.shape[1] == self._tables.shape[1]
        out_table, out_lens = self._tables[:rows], self._lengths[:rows]
        block_size = self.kv_cache_spec.block_size
        # Nothing behind the longest row's blocks is read.
        columns = min(cdiv(common.max_seq_len, block_size), table.shape[1])
        block_table_view(
            table[:, :columns],
            common.seq_lens,
            block_size,
            out_table=out_table[:, :columns],
            out_lens=out_lens,
        )
        return common.replace(
            block_table_tensor=out_table,
            seq_lens=out_lens,
            _num_computed_tokens_cache=None,
        )

    def _allocate(self, table: torch.Tensor, seq_lens: torch.Tensor) -> None:
        rows = max(
            table.shape[0],
            self.vllm_config.scheduler_config.max_num_seqs,
            self.vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self._tables = torch.zeros(
            (rows, table.shape[1]), dtype=table.dtype, device=table.device
        )
        self._lengths = torch.zeros(rows, dtype=seq_lens.dtype, device=table.device)


@functools.cache
def wrapped_backend(name: str) -> type:
    """The subclass of backend ``name`` that serves pruned requests.

    ``stock`` on it is vLLM's own class.
    """
    stock: Any = resolve_obj_by_qualname(WRAPPED_BACKENDS[name])
    impl = type("AslImpl", (TapMixin, stock.get_impl_cls()), {})
    builder = type("AslBuilder", (ViewMixin, stock.get_builder_cls()), {})

    def customize_spec(cls: type, spec: AttentionSpec) -> AttentionSpec:
        return prunable(stock.customize_spec(spec))

    return type(
        f"Asl_{name}",
        (stock,),
        {
            "__module__": __name__,
            "stock": stock,
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
            "customize_spec": classmethod(customize_spec),
        },
    )


def __getattr__(name: str) -> type:
    # vLLM resolves a backend by the path "module.attribute".
    if name.startswith("Asl_") and name[4:] in WRAPPED_BACKENDS:
        return wrapped_backend(name[4:])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Overrides the backends' enum entries in this process; idempotent."""
    for name in WRAPPED_BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.Asl_{name}")


def uninstall() -> None:
    """Takes the overrides back; layers that exist keep their backend."""
    for name in WRAPPED_BACKENDS:
        AttentionBackendEnum[name].clear_override()
