"""The truth the end-to-end tests compare with: plain PyTorch in fp32.

Nothing here imports vLLM, asl_vllm or asl_kernels, so that a fault in one of them
cannot hide in both sides of a comparison.
"""

from asl_vllm_testing.oracle.asl import OracleResult, generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import Prompt, key_value, needle
from asl_vllm_testing.random_model import write_random_model

__all__ = [
    "OracleResult",
    "Prompt",
    "TinyDecoder",
    "generate",
    "key_value",
    "needle",
    "write_random_model",
]
