"""Every test here may make engine configurations."""

from asl_vllm_testing.vllm_configs import quick_and_clean_vllm

__all__ = ["quick_and_clean_vllm"]
