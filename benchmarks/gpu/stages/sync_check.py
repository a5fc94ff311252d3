"""vLLM's own check for waits (`VLLM_GPU_SYNC_CHECK`) finds none of ours in a step.

Prefill passes are exempt: where they wait is counted by the stage `passes`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

from benchmarks.gpu.expected import BUDGET, MODEL, load
from benchmarks.gpu.stage import Host, Row, Stage
from benchmarks.gpu.stages.engines import FLASH, Way, ask, judge, options_of

WORDS = ("synchronizing CUDA operation", "GPU<->CPU sync detected")
"""Of torch's warning, and of vLLM's."""
OURS = ("asl_vllm/", "asl_kernels/")


def short(path: str) -> str:
    """A module's path from its package on."""
    for package in (*OURS, "vllm/", "torch/"):
        _, found, rest = path.rpartition("/" + package)
        if found:
            return package + rest
    return path


def run(host: Host) -> Iterator[Row]:
    """Yields rows for unpruned and for pruned prompts: answers, and waits by place."""
    host.gpu_only("waits for a device")
    from asl_vllm_testing.harness import engine, run_to_end

    prompts = [want.prompt for want in load()]
    with engine(MODEL, **options_of(Way("v2", FLASH, "default"), host)) as running:
        for what, budget in (("without a budget", None), ("pruned", BUDGET)):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                asked = ask(running, prompts, what[:3], budget=budget)
                run_to_end(running, *asked)
            places: Counter[str] = Counter()
            for warning in found:
                if any(words in str(warning.message) for words in WORDS):
                    places[short(warning.filename)] += 1
            row = judge(what, asked, pruned=budget is not None)
            ours = sum(n for place, n in places.items() if place.startswith(OURS))
            yield row | {
                "waits": dict(places),
                "ok": row["ok"] and not ours,
            }


STAGES = (
    Stage(
        "sync-check",
        "vLLM's own check for waits in a step, in warn mode",
        seconds=180,
        run=run,
        env=(("VLLM_GPU_SYNC_CHECK", "warn"), ("VLLM_USE_V2_MODEL_RUNNER", "1")),
    ),
)
