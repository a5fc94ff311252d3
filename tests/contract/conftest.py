"""Every test here may make engine configurations."""

from tests.vllm_configs import quick_and_clean_vllm

__all__ = ["quick_and_clean_vllm"]
