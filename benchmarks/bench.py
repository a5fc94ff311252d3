"""What an experiment is given: its scale, and engines that differ in nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines import EngineProcess, Measured, Variant
from benchmarks.rounds import STOCK
from benchmarks.scale import Scale, Shape


@dataclass(frozen=True)
class Bench:
    """The scale and the settings that all engines share."""

    scale: Scale
    dtype: str = "float32"
    eager: bool = True
    step_tokens: int = 2048
    weights: bool = True
    """Whether models have weights on disk, whose attention is peaked; False: whatever
    small numbers vLLM fills them with, which cost no time and say nothing."""
    share: bool = False
    """Whether all policies are served by one engine, for want of memory."""
    apart: bool = False
    """Whether engines that need the whole memory are measured one after the other."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of every engine, over what an experiment asks for."""

    @contextmanager
    def engines(
        self,
        shape: Shape,
        policies: dict[str, dict[str, Any]],
        *,
        max_model_len: int,
        pool_tokens: int,
        stock: bool = True,
        **options: Any,
    ) -> Iterator[list[Measured]]:
        """Stock vLLM, if wanted, and an engine for each of ``policies``, on one model.

        With `share` there is one engine for all of ``policies``.
        """
        settings = self.settings(
            shape, max_model_len=max_model_len, pool_tokens=pool_tokens, **options
        )
        with self.model(shape) as model, ExitStack() as stack:

            def start(name: str, policy: dict[str, Any] | None) -> EngineProcess:
                process = EngineProcess(name, model, settings, policy)
                process.wait_until_ready()
                return stack.enter_context(process)

            started: list[Measured] = [start(STOCK, None)] if stock else []
            if self.share and len(policies) > 1:
                # The selection layer is a matter of the workers alone, and the
                # policy one of requests; memory is as the first policy has it.
                host = start("all", next(iter(policies.values())))
                started += [Variant(name, host, p) for name, p in policies.items()]
            else:
                started += [start(name, policy) for name, policy in policies.items()]
            yield started

    @contextmanager
    def model(self, shape: Shape) -> Iterator[str]:
        """The folder of a random model, while it is needed."""
        # Here, so that experiments can be listed without torch.
        from asl_vllm_testing.random_model import write_random_model

        with tempfile.TemporaryDirectory() as folder:
            yield str(
                write_random_model(
                    Path(folder), max_position=1 << 18, weights=self.weights, **shape
                )
            )

    def settings(
        self, shape: Shape, *, max_model_len: int, pool_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """Arguments of `LLM` that all engines of an experiment share."""
        block_size = options.pop("block_size", 32)
        # One block is vLLM's null block.
        blocks = -(-pool_tokens // block_size) + 1
        width = 2 * shape["kv_heads"] * shape["head_dim"] * shape["layers"]
        itemsize = 4 if self.dtype == "float32" else 2
        return {
            "dtype": self.dtype,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": self.step_tokens,
            "max_num_seqs": 32,
            "block_size": block_size,
            "enforce_eager": self.eager,
            "enable_prefix_caching": False,
            "num_gpu_blocks_override": blocks,
            "kv_cache_memory_bytes": blocks * block_size * width * itemsize,
            "load_format": "auto" if self.weights else "dummy",
            **options,
            **self.options,
        }
