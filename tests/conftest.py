"""Settings that must be made before torch and vLLM are imported."""

from __future__ import annotations

import os

# The models of the tests are too small to share among threads, and threads that
# spin for each other are slow where cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In-process engine core; no network; no pinning to cores that others use too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
