"""These tests run on their own: ``TRITON_INTERPRET=1 pytest tests/triton``.

The variable makes `triton.jit` build interpreted functions wherever Triton is first
imported. In the process of the other tests vLLM asks whether Triton and a GPU driver
are there and chooses its kernels by the answer; an interpreted Triton must not leak
into that.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
