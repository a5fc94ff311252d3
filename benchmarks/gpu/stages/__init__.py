"""The stages of a run, in order: correctness first, then speed."""

from benchmarks.gpu.stage import Stage
from benchmarks.gpu.stages import (
    engines,
    kernels,
    passes,
    ranks,
    reuse,
    rule,
    share,
    speed,
    sync_check,
)

_ALL = (
    *rule.STAGES,
    *kernels.STAGES,
    *passes.STAGES,
    *sync_check.STAGES,
    *engines.STAGES,
    *reuse.STAGES,
    *ranks.STAGES,
    *share.STAGES,
    *speed.STAGES,
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
assert len(STAGES) == len(_ALL)
