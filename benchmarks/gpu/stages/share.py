"""What part of a layer's prefill goes into selection.

A few layers of Llama 8B's shape prefill a prompt; every layer is scored, ranked and
gathered, none selects. A layer's time is that of its passes, selection's that of all
that comes between a layer's last pass and the next layer's first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.sizes import GRAPHS, STEP_TOKENS, shape
from benchmarks.gpu.stage import Host, Row, Stage
from benchmarks.load import random_prompt

LAYERS, L_OBS = 12, 8
TOKENS, BUDGET = (8192, 32768, 131072), 1024
DRY_TOKENS, DRY_BUDGET = (256, 512), 96


class Clock:
    """Sums the time that calls of a function take on the device."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._pairs: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self._pairs.append((begin, self._now()))

        return timed

    def take(self) -> list[float]:
        """Milliseconds of each call since the last `take`."""
        if self._gpu:
            import torch

            torch.cuda.synchronize()
            found = [begin.elapsed_time(end) for begin, end in self._pairs]
        else:
            found = [(end - begin) * 1e3 for begin, end in self._pairs]
        self._pairs.clear()
        return found


def run(host: Host) -> Iterator[Row]:
    """Yields a row a length."""
    from asl_vllm.prefill.passes import Prefill
    from asl_vllm_testing.harness import engine
    from asl_vllm_testing.random_model import write_random_model

    lengths, budget = (DRY_TOKENS, DRY_BUDGET) if host.dry else (TOKENS, BUDGET)
    layers = 4 if host.dry else LAYERS
    own = shape("8b", host) | {"layers": layers}
    model = write_random_model(
        host.work / "model", max_position=1 << 18, weights=host.dry, **own
    )
    # tau 0: nothing is ever below it, but all is computed that decides.
    policy = {"policy": "asl", "tau": 0.0, "l_min": 1, "l_obs": L_OBS}
    options: dict[str, Any] = {
        "policy": policy,
        "max_model_len": max(lengths) + 64,
        "max_num_batched_tokens": 128 if host.dry else STEP_TOKENS,
    }
    if not host.dry:
        options |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05}
        options |= {"load_format": "dummy", "enforce_eager": False}
        options |= {"compilation_config": GRAPHS, "kv_cache_memory_bytes": 1 << 33}
        options |= {"attention_backend": "FLASH_ATTN"}
    passes, selection = Clock(not host.dry), Clock(not host.dry)
    stock = Prefill._finish_layer
    with engine(model, **options) as running:
        decoder = running.factory.model
        decoder.run_layer = passes.around(decoder.run_layer)
        Prefill._finish_layer = selection.around(stock)  # type: ignore[method-assign]
        try:
            for tokens in lengths:
                for _ in range(2):  # the first compiles kernels
                    running.generate(
                        [random_prompt(tokens, 1)], budget=budget, max_tokens=1
                    )
                    layer_ms, own_ms = passes.take(), selection.take()
                # The last layer computes keys and values only.
                calls = len(layer_ms) // layers
                whole = [
                    sum(layer_ms[i * calls : (i + 1) * calls])
                    for i in range(layers - 1)
                ]
                # From here on all layers are compared.
                full = own_ms[min(L_OBS, layers - 1) - 1 : -1]
                layer, chosen = statistics.median(whole), statistics.median(full)
                yield {
                    "tokens": tokens,
                    "budget": budget,
                    "layer_ms": layer,
                    "selection_ms": chosen,
                    "share": chosen / layer,
                }
        finally:
            Prefill._finish_layer = stock  # type: ignore[method-assign]


STAGES = (
    Stage(
        "selection-share",
        "Share of a layer's prefill that goes into selection",
        seconds=150,
        run=run,
        timed=True,
    ),
)
