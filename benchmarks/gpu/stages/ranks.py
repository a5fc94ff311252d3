"""Two tensor-parallel ranks answer as one, where there are two GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.expected import MODEL, load
from benchmarks.gpu.stage import Host, Row, Skipped, Stage
from benchmarks.gpu.stages.engines import (
    FLASH,
    Way,
    both,
    options_of,
    pool_row,
)

RANKS = 2


def run(host: Host) -> Iterator[Row]:
    """Yields a row for unpruned prompts, one for pruned ones, and one of the pool."""
    way = Way("v2", FLASH, "full graphs", {"tensor_parallel_size": RANKS})
    if not host.dry:
        import torch

        if (found := torch.cuda.device_count()) < RANKS:
            raise Skipped(f"needs {RANKS} GPUs; there is {found}")
    from asl_vllm_testing.harness import assert_pool_whole, engine

    prompts = [want.prompt for want in load()]
    with engine(MODEL, **options_of(way, host)) as running:
        yield from both(running, prompts)
        yield pool_row(running, assert_pool_whole)


STAGES = (
    Stage(
        "ranks",
        "Answers of two tensor-parallel ranks; skipped where there is one GPU",
        seconds=180,
        run=run,
    ),
)
