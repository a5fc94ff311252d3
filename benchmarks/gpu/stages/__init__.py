"""The stages of a run, in order: correctness first, then speed."""

from benchmarks.gpu.stage import Stage
from benchmarks.gpu.stages import engines, kernels, passes, rule, share, speed

_ALL = (
    *rule.STAGES,
    *kernels.STAGES,
    *passes.STAGES,
    *engines.STAGES,
    *share.STAGES,
    *speed.STAGES,
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
assert len(STAGES) == len(_ALL)
