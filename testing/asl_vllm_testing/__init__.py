"""What tests, benchmarks, training and scripts share; shipped in no wheel.

`oracle` is the rule and a decoder in plain PyTorch, `golden` the recordings of the
authors' implementation, `models` a small model; the others start engines, servers and
schedulers, or stand in for parts of them. Nothing is imported here, because some
users must not import vLLM, and others not asl_vllm.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
TINY_MODEL = Path(__file__).parent / "models" / "tiny_retriever"
"""A model of ten layers that finds numbers in its prompt."""
SHIPPED_MODEL = ROOT / "examples" / "deep_retriever"
"""The model of sixteen layers that the demo and the examples serve."""
