"""What a prefill makes the host and the device do: launches, waits, compilations.

An engine with vLLM's default compilation, of a few layers of Llama 8B's shape. Each
policy prunes two prompts that differ in length by a token. Right is that nothing is
compiled after the start, that a pass launches few kernels, and that the host waits for
the device no more often than layers can be selected at. Short prompts that pass
together and prompts over a cached prefix compile nothing either.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu.sizes import STEP_TOKENS, shape
from benchmarks.gpu.stage import Host, Row, Stage
from benchmarks.load import random_prompt

LAYERS, L_MIN = 8, 3
TOKENS, BUDGET = 8192, 1024
SHORT, SHORT_PROMPTS = 512, 8
MOST_LAUNCHES = 20
MOST_WAITS = LAYERS - L_MIN + 2


class Watch:
    """Counts compilations, and calls that wait for the device, of this process."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.waits: Counter[str] = Counter()
        self._hook_triton()

    def _hook_triton(self) -> None:
        import triton

        before = triton.knobs.runtime.jit_post_compile_hook

        def hook(*args: Any, **given: Any) -> Any:
            self.compiled.append(str(getattr(given.get("fn"), "name", "a kernel")))
            return None if before is None else before(*args, **given)

        triton.knobs.runtime.jit_post_compile_hook = hook

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request."""
        import torch
        from torch._dynamo.utils import counters

        self.compiled.clear()
        self.waits.clear()
        graphs = counters["stats"]["unique_graphs"]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.compiled += ["a graph"] * (counters["stats"]["unique_graphs"] - graphs)
        for warning in found:
            if "synchronizing" in str(warning.message):
                place = warning.filename.rpartition("/")[2]
                self.waits[f"{place}:{warning.lineno}"] += 1


def is_ours(place: str) -> bool:
    """Whether it is in a module that passes run."""
    ours = ("deciding", "passes", "hidden", "agreement", "decoder", "chunks")
    return place.partition(".")[0] in ours


def counted(function: Callable[..., Any], kernels: list[Counter[str]]) -> Any:
    """The function, with the kernels of each call noted."""
    from torch.profiler import ProfilerActivity, profile

    def call(*args: Any, **given: Any) -> Any:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            result = function(*args, **given)
        names: Counter[str] = Counter()
        for event in profiler.events() or ():
            if "CUDA" in str(event.device_type) and not event.name.startswith("Mem"):
                names[event.name] += 1
        kernels.append(names)
        return result

    return call


def run(host: Host) -> Iterator[Row]:
    """Yields a row a request, and one of a pass."""
    host.gpu_only("launches and waits are a GPU's")
    from asl_vllm.selection.policies import POLICIES
    from asl_vllm_testing.harness import engine
    from asl_vllm_testing.random_model import write_random_model

    own = shape("8b", host) | {"layers": LAYERS}
    model = write_random_model(
        host.work / "model", max_position=1 << 18, weights=False, **own
    )
    options: dict[str, Any] = {
        # tau 0: asl never selects, so every layer from l_min on makes the host wait.
        "policy": {
            "policy": "asl",
            "l_min": L_MIN,
            "l_obs": 3,
            "tau": 0.0,
            "reuse": "none",
        },
        "max_model_len": 2 * TOKENS,
        "max_num_batched_tokens": STEP_TOKENS,
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.05,
        "load_format": "dummy",
        "enforce_eager": False,
        "kv_cache_memory_bytes": 1 << 31,
        "attention_backend": "FLASH_ATTN",
    }
    with engine(model, **options) as running:
        watch = Watch()
        for policy in POLICIES:
            for tokens in (TOKENS, TOKENS + 1):
                began = time.perf_counter()
                with watch.request():
                    (output,) = running.generate(
                        [random_prompt(tokens, 1)],
                        budget=BUDGET,
                        policy=policy,
                        max_tokens=1,
                    )
                waits = dict(watch.waits)
                in_passes = sum(n for place, n in waits.items() if is_ours(place))
                yield {
                    "policy": policy,
                    "tokens": tokens,
                    "seconds": time.perf_counter() - began,
                    "compiled": ", ".join(watch.compiled) or "nothing",
                    "waits": in_passes,
                    "all_waits": str(waits),
                    "selection_layer": output.kv_transfer_params["selection_layer"],
                    "ok": not watch.compiled and in_passes <= MOST_WAITS,
                }
        yield from others(running, watch)
        decoder = running.factory.model
        kernels: list[Counter[str]] = []
        decoder.run_layer = counted(decoder.run_layer, kernels)
        running.generate([random_prompt(TOKENS, 2)], budget=BUDGET, max_tokens=1)
        del decoder.run_layer
        full = kernels[1]
        yield {
            "what": "kernels of a pass",
            "launches": sum(full.values()),
            "names": "; ".join(f"{n} {name[:60]}" for name, n in full.items()),
            "ok": sum(full.values()) <= MOST_LAUNCHES,
        }


def others(running: Any, watch: Watch) -> Iterator[Row]:
    """Short prompts that pass together, and prompts over a cached prefix."""
    short = [random_prompt(SHORT + i, 100 + i) for i in range(SHORT_PROMPTS)]
    document = random_prompt(TOKENS - SHORT, 3)
    running.generate([document], max_tokens=1)
    question = document + random_prompt(SHORT, 4)
    several = [document + random_prompt(SHORT + i, 10 + i) for i in range(3)]
    for what, prompts, policy, reuse in (
        (f"{SHORT_PROMPTS} short prompts", short, "asl", "none"),
        ("over a cached prefix", [question], "snapkv", "read"),
        ("over a cached prefix", [question], "asl", "read"),
        ("3 over a cached prefix", several, "asl", "read"),
        # Selects, so tokens of the prefix go through the first layers again.
        ("over a cached prefix", [question], "fastkv", "read"),
    ):
        with watch.request():
            outputs = running.generate(
                prompts, budget=SHORT // 2, policy=policy, reuse=reuse, max_tokens=1
            )
        waits = dict(watch.waits)
        cached = outputs[0].num_cached_tokens or 0
        yield {
            "what": what,
            "policy": policy,
            "tokens": len(prompts[0]),
            "cached": cached,
            "compiled": ", ".join(watch.compiled) or "nothing",
            "waits": sum(n for place, n in waits.items() if is_ours(place)),
            "all_waits": str(waits),
            "ok": not watch.compiled and (reuse == "none" or cached > 0),
        }


STAGES = (
    Stage(
        "passes",
        "Launches, waits and compilations of prefills, vLLM's default compilation",
        seconds=200,
        run=run,
    ),
)
