"""vLLM's workers with the memory and the model of pruned prefills.

Touch points: ``parallel_config.worker_cls`` names one of these subclasses;
`load_model` reserves the memory before vLLM sizes the KV pool,
`initialize_from_config` hands a `PrefillQueue` to the connector, and
`compile_or_warm_up_model` runs prefills before there are requests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.mem_utils import format_gib
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, SlidingWindowSpec

from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.kv_spec import in_bands, without_idle_windows
from asl_vllm.engine.settings import settings_of
from asl_vllm.engine.worker import attention
from asl_vllm.engine.worker.checks import (
    check_attention,
    check_windows,
    one_spec,
)
from asl_vllm.engine.worker.decoder import VllmDecoder, shape_of
from asl_vllm.engine.worker.scratch import ScratchPages, scratch_spec
from asl_vllm.engine.worker.stages.find import attention_layers
from asl_vllm.engine.worker.warm_up import warm_up
from asl_vllm.prefill import (
    Packer,
    PrefillBuffers,
    PrefillFactory,
    PrefillQueue,
    most_packed,
)
from asl_vllm.selection.policies import (
    installed_policies,
    policies_beside_windows,
)

logger = init_logger(__name__)


class PrefillWorkerMixin:
    """Reserves prefill memory after loading and builds the prefill queue."""

    vllm_config: Any
    device: Any
    model_runner: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        attention.install()
        super().__init__(*args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model, then takes the memory of one prompt's prefill."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        # What the executor does next. The memory taken here is in blocks, and unless
        # the user gave their size a backend may prefer another than the default: on
        # CPUs, or with FlashAttention 4 and heads of 256.
        current_platform.update_block_size_for_backend(self.vllm_config)
        settings_of(self.vllm_config).check_budget()
        # Here and not at the first request, which would wait for their imports.
        installed_policies()
        model = self.model_runner.get_model()
        attentions = attention_layers(model)
        check_attention(attentions)
        settings = settings_of(self.vllm_config)
        specs = self.model_runner.get_kv_cache_spec()
        self._prefill_spec = one_spec(without_idle_windows(specs, settings))
        capacity, config = settings.prefill_capacity, settings.config
        self._prefill_shape = shape_of(model, self.vllm_config, self.device)
        assert self._prefill_shape.num_layers == settings.num_layers
        check_windows(self._prefill_shape.windows, settings.scored_layers)
        windows = self._prefill_shape.windows
        on_host = config.hidden_memory == "host"
        self._buffers = PrefillBuffers(
            self._prefill_shape,
            capacity,
            config.window,
            # Windows see rows of one prompt.
            packed=1 if windows else most_packed(settings.chunk_tokens, config.window),
            host_chunk=settings.chunk_tokens if on_host else None,
        )
        spec = scratch_spec(self._prefill_spec, attentions[0].impl)
        self._scratch = ScratchPages(spec, capacity, self.device)
        logger.info(
            "asl_vllm: policy %s; reuse %s; %s",
            config.policy,
            settings.reuse,
            self._memory_line(),
        )

    def _memory_line(self) -> str:
        capacity, host = self._buffers.capacity, self._buffers.host_bytes
        device = self._buffers.device_bytes + self._scratch.num_bytes
        line = (
            f"prefill memory for prompts of up to {capacity} tokens: "
            f"{format_gib(device)} GiB ({device // capacity} bytes a token), outside "
            "the KV pool"
        )
        if host:
            line += (
                f", and {format_gib(host)} GiB ({host // capacity} bytes a token) of "
                "host memory"
            )
        return line

    @property
    def prefill_bytes(self) -> int:
        """Bytes reserved for prefills, on device and host, outside the KV pool."""
        buffers = self._buffers
        return buffers.device_bytes + buffers.host_bytes + self._scratch.num_bytes

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The layers' specs, in the bands that vLLM makes KV-cache groups of."""
        names = [
            layer.layer_name
            for layer in attention_layers(self.model_runner.get_model())
        ]
        settings = settings_of(self.vllm_config)
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        specs = without_idle_windows(specs, settings)
        return in_bands(specs, settings.bands, names)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Makes the KV pool, then the queue of pruned prefills over it."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        cache_config = self.vllm_config.cache_config
        self._scratch.lay_out(cache_config.get_resolved_kv_cache_layout())
        self._check_pages()
        shape = self._prefill_shape
        if shape.windows:
            groups = self._groups(kv_cache_config)
            shape = dataclasses.replace(shape, groups=groups)
        decoder = VllmDecoder(
            self.model_runner.get_model(), self.vllm_config, shape, self._scratch
        )
        settings = settings_of(self.vllm_config)
        self._factory = PrefillFactory(
            decoder, self._buffers, settings.config, settings.chunk_tokens
        )
        self._packer = Packer(self._factory, self._scratch.spec.block_size)
        # Ours, alone or beside another.
        connector: Any = get_kv_transfer_group()
        connector.bind_prefill_queue(PrefillQueue(self._factory, self._packer))

    def _groups(self, kv_cache_config: KVCacheConfig) -> tuple[int, ...]:
        """See `ModelShape.groups`: groups with a window and without are two counts."""
        found: dict[str, int] = {}
        counts = {True: 0, False: 0}
        for group in kv_cache_config.kv_cache_groups:
            windowed = isinstance(group.kv_cache_spec, SlidingWindowSpec)
            found.update(dict.fromkeys(group.layer_names, counts[windowed]))
            counts[windowed] += 1
        layers = attention_layers(self.model_runner.get_model())
        return tuple(found[layer.layer_name] for layer in layers)

    def compile_or_warm_up_model(self) -> Any:
        """Has all that prefills compile compiled, before vLLM does so with its own."""
        # On a CPU there is nothing to compile.
        if self.device.type == "cuda":
            settings = settings_of(self.vllm_config)
            windows = settings.has_windows
            warm_up(
                self._factory,
                policies_beside_windows() if windows else installed_policies(),
                settings.bands.count,
                self._packer,
                settings.block_size if settings.reads_prefixes else None,
            )
        return super().compile_or_warm_up_model()  # type: ignore[misc]

    def _check_pages(self) -> None:
        """Refuses pools whose blocks are split for the attention kernels."""
        tokens, scratch = self._prefill_spec.block_size, self._scratch
        for layer in attention_layers(self.model_runner.get_model()):
            block = layer.kv_cache[0]
            rows = block.numel() * scratch.spec.block_size // scratch.pages[0].numel()
            if rows != tokens:
                raise UnsupportedError(
                    "KV blocks that the attention kernels take whole",
                    f"blocks of {tokens} tokens in kernel blocks of {rows}, shape "
                    f"{tuple(block.shape)}",
                    "choose the kernels' --block-size",
                )


def __getattr__(name: str) -> type:
    # Built on first use: importing the GPU worker on a CPU build costs time and
    # the reverse fails.
    if name == "AslCpuWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        worker: type = type(name, (PrefillWorkerMixin, CPUWorker), {})
    elif name == "AslGpuWorker":
        from vllm.v1.worker.gpu_worker import Worker

        worker = type(name, (PrefillWorkerMixin, Worker), {})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = worker
    return worker
