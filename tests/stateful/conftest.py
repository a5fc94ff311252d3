"""Profiles: the suite's examples are bounded and always the same."""

from hypothesis import HealthCheck, Phase, settings

from asl_vllm_testing.vllm_configs import quick_and_clean_vllm

__all__ = ["quick_and_clean_vllm"]

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
# Without shrinking, which takes minutes: rerun a failure with the other profile.
settings.register_profile(
    "suite",
    max_examples=50,
    stateful_step_count=40,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    **_COMMON,
)
# `make soak`: other examples each time, and many.
settings.register_profile("soak", max_examples=1500, stateful_step_count=100, **_COMMON)
settings.load_profile("suite")
