"""The experiments of `make bench` on the shapes of Llama 1B and 8B, in bf16.

Stock vLLM and asl_vllm run in turn, each in a process of its own with the same
settings. Weights are what vLLM fills them with: the selection layer is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.experiments import EXPERIMENTS
from benchmarks.gpu.sizes import bench
from benchmarks.gpu.stage import Host, Row, Stage

PARTS = (
    # Experiment, model, seconds; first what says most.
    ("prefill", "8b", 400),
    ("decode", "1b", 420),
    ("unpruned", "1b", 150),
    ("neighbours", "8b", 180),
    ("capacity", "8b", 180),
    ("overlong", "8b", 120),
    ("prefill", "1b", 180),
    ("unpruned", "8b", 180),
    ("decode", "8b", 420),
)


def stage_of(name: str, size: str, seconds: int, *, compiled: bool = False) -> Stage:
    """An experiment on a model, as a stage."""
    title = (EXPERIMENTS[name].__doc__ or "").partition("\n")[0].rstrip(".")

    def run(host: Host) -> Iterator[Row]:
        if compiled:
            host.gpu_only("compiled engines take minutes to start on a CPU")
        yield from EXPERIMENTS[name].run(bench(size, host, compiled=compiled))

    end = "-compiled" if compiled else ""
    how = ", compiled" if compiled else ""
    return Stage(
        name=f"{name}-{size}{end}",
        what=f"{title}, Llama {size.upper()}{how}",
        seconds=seconds,
        run=run,
        timed=True,
    )


STAGES = (
    *(stage_of(*part) for part in PARTS),
    stage_of("prefill", "8b", 480, compiled=True),
    stage_of("decode", "8b", 480, compiled=True),
    stage_of("prefill", "1b", 360, compiled=True),
    stage_of("unpruned", "1b", 300, compiled=True),
)
