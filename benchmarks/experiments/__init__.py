"""The experiments, one a module: what stock vLLM and asl_vllm do with the same load.

A module's docstring opens with its title; ``run(bench)`` yields rows, ``COLUMNS`` are
those of its table, and ``PLOT``, where it has one, names the axes of its plot.
"""

from types import ModuleType

from benchmarks.experiments import (
    capacity,
    decode,
    growth,
    losing,
    memory,
    neighbours,
    overlong,
    prefill,
    prefix,
    short,
    unpruned,
)

EXPERIMENTS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        prefill,
        prefix,
        short,
        growth,
        decode,
        capacity,
        neighbours,
        memory,
        overlong,
        unpruned,
        losing,
    )
}
