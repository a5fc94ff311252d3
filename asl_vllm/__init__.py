"""asl_vllm: per-request KV-cache budgets for vLLM, pruned during prefill.

Importing this package has no effects; vLLM calls :func:`asl_vllm.plugin.register`
through its ``vllm.general_plugins`` entry point.
"""

from asl_vllm._version import __version__

__all__ = ["__version__"]
