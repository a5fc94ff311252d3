"""The experiments of `make bench` on the shapes of Llama 1B and 8B, in bf16.

Stock vLLM and asl_vllm run in turn, each in a process of its own with the same
settings, vLLM's default compilation among them. Weights are what vLLM fills them with:
the selection layer is fixed. Most experiments share one pair of engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.experiments import EXPERIMENTS
from benchmarks.gpu.one_pair import started
from benchmarks.gpu.sizes import bench, gpu_memory, most_pool_tokens
from benchmarks.gpu.stage import Host, Row, Stage

TOGETHER = ("prefill", "prefix", "short", "unpruned", "neighbours", "decode")
"""Experiments on one pair of engines; first what says most."""
LONGEST, DRY_LONGEST = 131072, 640
ROOM, DRY_ROOM = 2048, 4096
"""Tokens of the longest request beside the longest prompt."""
ALONE = (
    # Experiments with a pool of their own: name, model, seconds.
    ("capacity", "8b", 180),
    ("overlong", "8b", 120),
)


def run_together(size: str, host: Host) -> Iterator[Row]:
    """Yields the rows of all experiments of a pair, each with its experiment's name."""
    given = bench(size, host, compiled=True)
    model = given.scale.layer_bound
    longest, room = (DRY_LONGEST, DRY_ROOM) if host.dry else (LONGEST, ROOM)
    pool = 16 * longest if host.dry else longest + 4096
    if not host.dry:
        # Where two pools of that size do not fit, without the longest prompt.
        pool = min(pool, most_pool_tokens(model, gpu_memory(), engines=2))
    with started(
        given, model, max_model_len=min(pool, longest + room), pool_tokens=pool
    ) as pair:
        for name in TOGETHER:
            for row in EXPERIMENTS[name].run(pair):
                yield {"experiment": name, **row}
        if longest + ROOM <= pool:
            # Each round takes half a minute.
            long = replace(
                pair.scale, prefill_tokens=(longest,), rounds=1, depths=(1 / 2,)
            )
            for row in EXPERIMENTS["prefill"].run(replace(pair, scale=long)):
                yield {"experiment": "prefill", **row}


def stage_of(name: str, size: str, seconds: int) -> Stage:
    """An experiment on a model, as a stage."""
    title = (EXPERIMENTS[name].__doc__ or "").partition("\n")[0].rstrip(".")

    def run(host: Host) -> Iterator[Row]:
        yield from EXPERIMENTS[name].run(bench(size, host))

    return Stage(
        name=f"{name}-{size}",
        what=f"{title}, Llama {size.upper()}",
        seconds=seconds,
        run=run,
        timed=True,
    )


def together(size: str, seconds: int) -> Stage:
    """The experiments of one pair of engines, as a stage."""
    return Stage(
        name=f"speed-{size}",
        what=f"{', '.join(TOGETHER)}, Llama {size.upper()}, compiled",
        seconds=seconds,
        run=lambda host: run_together(size, host),
        timed=True,
    )


STAGES = (
    together("8b", 420),
    together("1b", 240),
    *(stage_of(*part) for part in ALONE),
)
